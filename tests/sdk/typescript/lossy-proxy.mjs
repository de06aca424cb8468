// An HTTP proxy that can drop the answer to a request that the server has carried out.

import { once } from "node:events";
import { createServer } from "node:http";

const PASSED_ON = ["accept", "authorization", "content-type", "prefer", "user-agent"];

/** Answers like a gateway that timed out waiting for the server. */
export function badGateway(request, response) {
  response.writeHead(502, { "content-type": "text/html" });
  response.end("<html><body>502 Bad Gateway</body></html>");
}

/** Resets the connection. */
export function reset(request) {
  request.socket.resetAndDestroy();
}

/** Closes the connection cleanly without an answer, like a server that shuts down. */
export function hangUp(request) {
  request.socket.end();
}

/** Forwards all requests, and drops the answers that a test chooses. */
export class LossyProxy {
  /** The requests that reached the server, and its answers, even if the client got others. */
  exchanges = [];
  #losses = [];
  #server;

  /** Starts a proxy for `serverURL`. It stops after the test. */
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

  /** Drops the next answer, by `badGateway`, `reset` or `hangUp`. */
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
