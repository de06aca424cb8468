// A wire to an HTTP server that can lose the answer to a request that was carried out.

import { once } from "node:events";
import { createServer } from "node:http";

const PASSED_ON = ["accept", "authorization", "content-type", "prefer", "user-agent"];

/** What a gateway says that gave up waiting for the answer. */
export function badGateway(request, response) {
  response.writeHead(502, { "content-type": "text/html" });
  response.end("<html><body>502 Bad Gateway</body></html>");
}

/** The connection breaks: the client's system is told so. */
export function reset(request) {
  request.socket.resetAndDestroy();
}

/** The server ends the connection in good order, without an answer, as one that shuts down does. */
export function hangUp(request) {
  request.socket.end();
}

/** Passes everything on, and loses the answers that it is told to. */
export class LossyProxy {
  /** What reached the server, and what it answered, whatever the client got. */
  exchanges = [];
  #losses = [];
  #server;

  /** In front of `serverURL`, until the test is over. */
  static async start(test, serverURL) {
    const proxy = new LossyProxy();
    proxy.#server = createServer((request, response) => proxy.#pass(serverURL, request, response));
    proxy.#server.listen(0, "127.0.0.1");
    await once(proxy.#server, "listening");
    proxy.url = `http://127.0.0.1:${proxy.#server.address().port}`;
    test.after(() => {
      proxy.#server.close();
      proxy.#server.closeAllConnections();
    });
    return proxy;
  }

  /** Loses the next answer: `badGateway`, `reset` or `hangUp`. */
  loseNext(how) {
    this.#losses.push(how);
  }

  async #pass(serverURL, request, response) {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    const body = Buffer.concat(chunks).toString();
    const headers = Object.fromEntries(
      PASSED_ON.filter((name) => name in request.headers).map((name) => [name, request.headers[name]]),
    );
    const answer = await fetch(serverURL + request.url, { method: "POST", headers, body });
    const text = await answer.text();
    const operation = request.url.replace("/v2/", "");
    this.exchanges.push({ operation, request: body, status: answer.status, answer: text });
    const lose = this.#losses.shift();
    if (lose) return lose(request, response);
    response.writeHead(answer.status, { "content-type": answer.headers.get("content-type") });
    response.end(text);
  }
}
