//! What may lie between a store and its server: poolers that keep sessions together or don't, and TLS.

use std::net::Ipv4Addr;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Result, copy, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio_rustls::TlsAcceptor;

/// A message: its type, if it has one, and all after that.
type SessionMessage = (Option<u8>, Vec<u8>);

/// A pooler that drops a session's settings, like one that runs the next transaction on another connection.
pub(super) async fn without_settings(server: u16) -> u16 {
    serve(move |client| drop_settings(client, server)).await
}

/// A pooler that lends the server's only connection to its clients, for one transaction at a time.
pub(super) async fn lending(server: u16) -> u16 {
    let lent = Arc::new(Mutex::new(None));
    serve(move |client| lend(client, server, lent.clone())).await
}

/// The server, as one that speaks TLS alone.
pub(super) async fn encrypted(server: u16, acceptor: TlsAcceptor) -> u16 {
    serve(move |client| encrypt(client, server, acceptor.clone())).await
}

/// Serves each client in a task of its own, for as long as the test runs. Returns the port.
async fn serve<F>(handle: impl Fn(TcpStream) -> F + Send + 'static) -> u16
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            // It ends with an error when one side goes away.
            tokio::spawn(handle(client));
        }
    });
    port
}

async fn connect(server: u16) -> Result<TcpStream> {
    TcpStream::connect((Ipv4Addr::LOCALHOST, server)).await
}

async fn drop_settings(client: TcpStream, server: u16) -> Result<()> {
    let (mut answers, mut requests) = connect(server).await?.into_split();
    let (mut from_client, mut to_client) = client.into_split();
    tokio::spawn(async move { copy(&mut answers, &mut to_client).await });
    let hello = startup(&mut from_client, &mut requests).await?;
    write(&mut requests, &hello).await?;
    loop {
        let (kind, mut body) = read(&mut from_client).await?;
        if kind == Some(b'Q') && body[4..].starts_with(b"SET ") {
            let end = body.len() - 1;
            body[4..end].fill(b' ');
        }
        write(&mut requests, &(kind, body)).await?;
    }
}

/// The server's connection, and what it said when it was opened.
type Lent = Arc<Mutex<Option<(TcpStream, Vec<SessionMessage>)>>>;

async fn lend(mut client: TcpStream, server: u16, lent: Lent) -> Result<()> {
    let hello = {
        let (mut from_client, mut to_client) = client.split();
        loop {
            let message = read_untyped(&mut from_client).await?;
            if !asks_for_tls(&message) {
                break message;
            }
            to_client.write_all(b"N").await?;
        }
    };
    let mut connection = lent.lock().await;
    if connection.is_none() {
        let mut opened = connect(server).await?;
        write(&mut opened, &hello).await?;
        let mut said = Vec::new();
        while said.last().is_none_or(|(kind, _)| *kind != Some(b'Z')) {
            said.push(read(&mut opened).await?);
        }
        *connection = Some((opened, said));
    }
    for message in connection.iter().flat_map(|(_, said)| said) {
        write(&mut client, message).await?;
    }
    drop(connection);
    loop {
        let mut request = read(&mut client).await?;
        let mut connection = lent.lock().await;
        let Some((server, _)) = connection.as_mut() else { return Ok(()) };
        // Until its transaction ends, no other client has it.
        loop {
            match request.0 {
                Some(b'X') => return Ok(()),
                kind => {
                    write(server, &request).await?;
                    if matches!(kind, Some(b'Q' | b'S')) && is_idle(server, &mut client).await? {
                        break;
                    }
                }
            }
            request = read(&mut client).await?;
        }
    }
}

/// Passes on an answer to its end; returns whether the transaction has ended with it.
async fn is_idle(server: &mut TcpStream, client: &mut TcpStream) -> Result<bool> {
    loop {
        let answer = read(server).await?;
        write(client, &answer).await?;
        if answer.0 == Some(b'Z') {
            return Ok(answer.1.last() == Some(&b'I'));
        }
    }
}

async fn encrypt(mut client: TcpStream, server: u16, acceptor: TlsAcceptor) -> Result<()> {
    if !asks_for_tls(&read_untyped(&mut client).await?) {
        return Ok(());
    }
    client.write_all(b"S").await?;
    let mut client = acceptor.accept(client).await?;
    copy_bidirectional(&mut client, &mut connect(server).await?).await.map(drop)
}

/// The first message that isn't a question for TLS; those are passed on.
async fn startup(
    client: &mut (impl AsyncRead + Unpin),
    server: &mut (impl AsyncWrite + Unpin),
) -> Result<SessionMessage> {
    loop {
        let message = read_untyped(client).await?;
        if !asks_for_tls(&message) {
            return Ok(message);
        }
        write(server, &message).await?;
    }
}

fn asks_for_tls((_, body): &SessionMessage) -> bool {
    body[4..].starts_with(&80_877_103_u32.to_be_bytes())
}

async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<SessionMessage> {
    let kind = from.read_u8().await?;
    Ok((Some(kind), read_untyped(from).await?.1))
}

async fn read_untyped(from: &mut (impl AsyncRead + Unpin)) -> Result<SessionMessage> {
    let length = from.read_u32().await?;
    let mut body = length.to_be_bytes().to_vec();
    body.resize(length as usize, 0);
    from.read_exact(&mut body[4..]).await?;
    Ok((None, body))
}

async fn write(to: &mut (impl AsyncWrite + Unpin), (kind, body): &SessionMessage) -> Result<()> {
    let bytes: Vec<u8> = kind.iter().chain(body).copied().collect();
    to.write_all(&bytes).await
}
