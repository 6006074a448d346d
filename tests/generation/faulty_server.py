"""Local server of the chat protocol with scripted faults, for tests."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "half", "nothing", "schema", "slow")


def answer(text, reason="stop", **message):
    return {
        "choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }


@contextmanager
def faulty_server(fault_of=lambda number, body: None, text_of=lambda body: f"about {body['seed']}", drip=0.5):
    """Serve on loopback, and yield the address and counts.

    `fault_of` returns the fault of a numbered request, and `text_of` the text of an answer, or a whole response.
    """
    counts, lock = Counter(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = counts["requests"]
                counts["requests"] += 1
                fault = fault_of(number, body)
                counts[fault or "fine"] += 1
                counts["with key"] += self.headers.get("authorization") == "Bearer a-secret"
            text = text_of(body)
            content = json.dumps(text if isinstance(text, dict) else answer(text)).encode()
            status, headers = 200, {}
            if fault == "429":
                status, headers = 429, {"Retry-After": "0.01"}
            elif fault == "half":
                content = content[: len(content) // 2]
            elif fault == "nothing":
                content = b""
            elif fault == "schema":
                content = b'{"choices": [{"text": 5}]}'
            elif fault and fault.isdecimal():
                status = int(fault)
                content = json.dumps({"error": self.headers.get("authorization", "")}).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                if fault == "slow":
                    for byte in content[:3]:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(drip)
                else:
                    self.wfile.write(content)
            except OSError:
                pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, request, client_address):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", counts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
