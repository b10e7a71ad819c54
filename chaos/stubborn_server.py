"""A server that is hard to end, for the launcher's fault tests.

    python stubborn_server.py MODEL [--headless] --host HOST --port PORT ...

It takes vLLM's arguments, ignores SIGTERM, and holds shared memory. So does its grandchild, which has a session of its own
and listens on a port. With AREAL_TEST_POLITE in its environment, it ends on SIGTERM; its grandchild does not.
"""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import shared_memory


def main() -> None:
    if "AREAL_TEST_POLITE" not in os.environ or sys.argv[1] == "grandchild":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    memory = shared_memory.SharedMemory(create=True, size=1 << 20)
    memory.buf[0] = 1
    if sys.argv[1] == "grandchild":
        with socket.socket() as listener:
            listener.bind((os.environ["VLLM_HOST_IP"], 0))
            listener.listen()
            print("port", listener.getsockname()[1], flush=True)
            time.sleep(3600)
    subprocess.Popen([sys.executable, __file__, "grandchild"], start_new_session=True)
    if "--headless" in sys.argv:
        time.sleep(3600)
    host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    http.server.HTTPServer((host, int(port)), Health).serve_forever()


if __name__ == "__main__":
    main()
