"""The server that a person would write: FastAPI, and transformers' ``generate`` in a thread for each request.

python -m tests.bench.serving_plain DIRECTORY PORT THREADS
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import fastapi
import torch
import transformers
import uvicorn
from starlette.responses import StreamingResponse


class Streamer(transformers.TextIteratorStreamer):  # type: ignore[misc]
    """Lets each token out at once. transformers' own holds text back until a space comes, which would make its time
    to the first token look longer than it is."""

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.on_finalized_text(self.tokenizer.decode(value.tolist()))

    def end(self) -> None:
        self.on_finalized_text("", stream_end=True)


def application(directory: str) -> fastapi.FastAPI:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    app = fastapi.FastAPI()

    @app.post("/v1/completions")
    def completions(body: dict[str, Any]) -> StreamingResponse:
        inputs = tokenizer(body["prompt"], return_tensors="pt")
        streamer = Streamer(tokenizer)
        arguments = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "max_new_tokens": body["max_tokens"],
            "do_sample": False,
            "streamer": streamer,
        }
        threading.Thread(target=model.generate, kwargs=arguments).start()

        def events() -> Iterator[str]:
            for text in streamer:
                yield f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/health")
    def health() -> str:
        return "ok"

    return app


def main() -> None:
    directory, port, num_threads = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    uvicorn.run(application(directory), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
