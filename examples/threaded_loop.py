"""A small loop, as a server would have one: a thread drives the engine, others send requests and read answers.

    python examples/threaded_loop.py

`step` moves all running requests one round on, whoever sent them. Requests come and go while it runs, share its
batch, and each has the text that it would have alone.
"""

import queue
import threading

from specengine import Engine, SamplingParams, bundled


class Server:
    """Requests from any thread; an answer comes piece by piece out of a queue."""

    def __init__(self, engine):
        self.engine = engine
        self.lock = threading.Lock()
        self.inboxes = {}  # by request id
        self.thread = threading.Thread(target=self._drive)
        self.thread.start()

    def _drive(self):
        # Sleeps while there is nothing to do; ends when the engine is closed.
        while self.engine.wait_for_work():
            for event in self.engine.step():
                with self.lock:  # an event may come before its request's inbox is known
                    inbox = self.inboxes[event.index]
                inbox.put(event)

    def send(self, prompt, params):
        """The request's id, and the queue of its events."""
        with self.lock:
            request_id = self.engine.add_request(prompt, params)
            self.inboxes[request_id] = inbox = queue.Queue()
        return request_id, inbox

    def answer(self, inbox):
        """Waits for the end of a request."""
        while True:
            event = inbox.get(timeout=60)
            if event.result is not None:
                return event.result

    def close(self):
        self.engine.close()
        self.thread.join()


PROMPTS = ["import os\n", "class Stack:\n", "def main():\n", "# numbers\n"]
PARAMS = SamplingParams(max_new_tokens=30, ignore_eos=True)
answers = {}

server = Server(Engine(bundled.target_path(), bundled.draft_path()))


def client(prompt):
    _, inbox = server.send(prompt, PARAMS)
    answers[prompt] = server.answer(inbox)


clients = [threading.Thread(target=client, args=(prompt,)) for prompt in PROMPTS]
for thread in clients:
    thread.start()

# One that its reader no longer wants:
request_id, inbox = server.send("x = [", SamplingParams(max_new_tokens=900, ignore_eos=True))
server.engine.abort(request_id)
print("ended early by:", server.answer(inbox).finish_reason)

for thread in clients:
    thread.join()
for prompt in PROMPTS:
    print(f"{prompt!r}: {answers[prompt].metrics.num_generated_tokens} tokens")
    assert answers[prompt].token_ids == server.engine.generate(prompt, PARAMS).token_ids
server.close()
print("closed")
