"""For models that cannot be batched: transformers' own ``generate``, one sequence after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers

from workloads.serve.batching_row import Outbox, Row
from workloads.serve.decoding import Sampling, choose
from workloads.serve.loading import NonFiniteLogits


class OneByOne:
    """The model's only thread, which ends once nobody holds this."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")

    def warm_up(self, token: int) -> None:
        """Look at what comes after one token.

        Raises:
            NonFiniteLogits: the model answers NaN.
        """
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([[token]], device=self._model.device)).logits[:, -1]
        if choose(logits, Sampling()) == [None]:
            raise NonFiniteLogits("The model's logits are not finite numbers.")

    def submit(self, row: Row) -> None:
        self._thread.submit(self._run, row)

    def _run(self, row: Row) -> None:
        outbox = Outbox()
        try:
            if not row.gone:
                self._generate(row, outbox)
        except Exception as e:
            outbox.put(row, e)
            outbox.send()

    def _generate(self, row: Row, outbox: Outbox) -> None:
        prompt = torch.tensor([row.generation.prompt], device=self._model.device)
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=transformers.GenerationConfig(do_sample=False, max_new_tokens=row.generation.max_tokens),
            logits_processor=transformers.LogitsProcessorList([_Choose(row, self._model.device)]),
            stopping_criteria=transformers.StoppingCriteriaList([_Deliver(row, outbox)]),
        )


class _Choose(transformers.LogitsProcessor):  # type: ignore[misc]
    """Leaves the one token that the request's own random numbers choose: ``generate`` samples from torch's global
    ones, which requests share."""

    def __init__(self, row: Row, device: Any) -> None:
        self._sampling = Sampling.of([row], device)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Shape (1, vocabulary) in and out."""
        (token,) = choose(scores, self._sampling)
        if token is None:
            raise NonFiniteLogits("The model's logits are not finite numbers.")
        left = torch.full_like(scores, float("-inf"))
        left[0, token] = 0.0
        return left


class _Deliver(transformers.StoppingCriteria):  # type: ignore[misc]
    """Passes every new token on, and says when to stop."""

    def __init__(self, row: Row, outbox: Outbox) -> None:
        self._row, self._outbox = row, outbox

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        token = self._row.advance(int(input_ids[0, -1]))
        self._outbox.put(self._row, token)
        self._outbox.send()
        return torch.tensor([token.finish_reason is not None or self._row.gone], device=input_ids.device)
