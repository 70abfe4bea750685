"""A web server on loopback that serves files and every kind of trouble."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebServer(ThreadingHTTPServer):
    """Answers ``/root/<name>`` from `files`, a dict of bytes, and what `_Handler` says otherwise; notes all paths."""

    daemon_threads = True

    def __init__(self, tls=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.files, self.asked = {}, []
        self.elsewhere = ""  # where redirects lead
        self.over = threading.Event()
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.server_port}"
        self.root = f"{self.url}/root/"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that go away are what is tested

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if name in self.server.files:
            data = self.server.files[name]
            self.begin(200, **{"Content-Length": len(data)})
            self.wfile.write(data)
        else:
            getattr(self, name, self.missing)()

    def begin(self, status, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def missing(self):
        self.begin(404, **{"Content-Length": 0})

    def redirect(self):
        self.begin(302, Location=self.server.elsewhere, **{"Content-Length": 4})
        self.wfile.write(b"page")

    def forbidden(self):
        self.begin(403)

    def broken(self):
        self.begin(500)

    def plain(self):  # no length: the end is where the connection ends
        self.begin(200)
        self.wfile.write(b"12345678")

    def chunked(self):
        self.protocol_version = "HTTP/1.1"
        self.begin(200, **{"Transfer-Encoding": "chunked"})
        self.wfile.write(b"5\r\n12345\r\n3\r\n678\r\n0\r\n\r\n")

    def cut_chunk(self):
        self.protocol_version = "HTTP/1.1"
        self.begin(200, **{"Transfer-Encoding": "chunked"})
        self.wfile.write(b"8\r\n1234")

    def cut(self):
        self.begin(200, **{"Content-Length": 8})
        self.wfile.write(b"1234")

    def longer(self):  # than it says
        self.begin(200, **{"Content-Length": 8})
        self.wfile.write(b"12345678" * 2)

    def endless(self):
        self.begin(200)
        while not self.server.over.is_set():
            self.wfile.write(bytes(65536))

    def huge(self):
        self.begin(200, **{"Content-Length": 10**15})
        self.server.over.wait()

    def silent(self):
        self.server.over.wait()

    def stops(self):
        self.begin(200, **{"Content-Length": 8})
        self.wfile.write(b"1234")
        self.server.over.wait()

    def drips(self):
        self.begin(200, **{"Content-Length": 10**6})
        while not self.server.over.wait(0.02):
            self.wfile.write(b"1")

    def streams(self):  # endless, and no piece of it is late
        self.begin(200)
        while not self.server.over.wait(0.05):
            self.wfile.write(bytes(65536))

    def drips_headers(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while not self.server.over.wait(0.02):
            self.wfile.write(b"1")

    def garbage(self):
        self.wfile.write(b"\xff" * 100 + b"\r\n")

    def log_message(self, *_):
        pass
