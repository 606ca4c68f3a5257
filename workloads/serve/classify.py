"""``POST /v1/classify``: texts, and the class of each."""

from __future__ import annotations

import asyncio
import secrets
import time

from starlette.responses import JSONResponse, Response

from workloads.serve import classify_api
from workloads.serve.http import VERSION_HEADER, api_errors, require_model, timed_out
from workloads.serve.loaded import Loaded


async def classify(body: bytes, loaded: Loaded, deadline_s: float | None = None) -> Response:
    """
    Raises:
        ApiError: what is wrong with the request, or with the server now.
    """
    request = classify_api.parse_classify(body)
    require_model(loaded.version.model if request.model is None else request.model, loaded)
    version, classifier = loaded.version, loaded.classifier()
    with loaded.counter.request(), api_errors(version.name), classifier.admit(len(request.input)):
        texts = [await classifier.encode(text) for text in request.input]
        classify_api.require_fit(texts, context_tokens=classifier.context_tokens)
        try:
            async with asyncio.timeout_at(deadline_s):
                probabilities = await classifier.classify(texts)
        except TimeoutError as e:
            raise timed_out() from e
    answer = classify_api.classification(
        f"classify-{secrets.token_hex(12)}",
        created_s=time.time(),
        model=version.model,
        labels=classifier.labels,
        probabilities=probabilities,
        num_tokens=sum(len(text) for text in texts),
    )
    return JSONResponse(answer, headers={VERSION_HEADER: version.name})
