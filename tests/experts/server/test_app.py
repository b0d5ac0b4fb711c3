"""The endpoints, asked by OpenAI's own client at a live server, with either kind of batch."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serving import NAMES, PROMPT, Live, error_of, keyed, live, make_batcher, make_host, offline, post

from tersor.experts.bench.skills import examples
from tersor.experts.bench.soak import kill_batch
from tersor.experts.host import ExpertHost
from tersor.experts.router.routing import Router


def joined(stream: Any) -> str:
    return "".join(choice.text for chunk in stream for choice in chunk.choices)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_streamed_or_not_the_text_is_that_of_generate(served: Live, expected: dict[str, str]) -> None:
    client = served.client()
    assert len(set(expected.values())) == len(expected), "one prompt for all, and each has its own answer"
    for name, text in expected.items():
        asked = {"model": name, "prompt": PROMPT, "max_tokens": 12}
        whole = client.completions.create(**asked)
        assert (whole.choices[0].text, whole.model) == (text, name)
        assert whole.choices[0].finish_reason == ("length" if whole.usage.completion_tokens == 12 else "stop")
        *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        assert joined(chunks) == text and last.choices == [] and last.usage == whole.usage
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
        assert all(chunk.usage is None for chunk in chunks)


def test_a_conversation_reads_as_its_prompt(served: Live, expected: dict[str, str]) -> None:
    client = served.client()
    asked: dict[str, Any] = {"model": "reverse", "max_completion_tokens": 12}
    asked["messages"] = [
        {"role": "system", "content": "bd"},
        {"role": "user", "content": [{"type": "text", "text": "ac>"}]},
    ]
    whole = client.chat.completions.create(**asked)
    assert (whole.choices[0].message.content, whole.choices[0].message.role) == (expected["reverse"], "assistant")
    first, *chunks = client.chat.completions.create(**asked, stream=True)
    assert (first.choices[0].delta.role, first.choices[0].finish_reason) == ("assistant", None)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected["reverse"]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_32_at_once_over_four_experts_and_the_router_are_answered_right(served: Live, reference: ExpertHost) -> None:
    asked = [(NAMES[n % 4], examples(NAMES[n % 4], 8, seed=3, held_out=True)[n % 8].prompt, n % 2) for n in range(32)]
    asked[::8] = [("auto", "what is 12 plus 345?", 0)] * 4
    wanted = [offline(reference, prompt, None if who == "auto" else who, 10) for who, prompt, _ in asked]
    routed = offline(reference, "what is 12 plus 345?", "add", 10)
    client = served.client()

    def ask(each: tuple[str, str, int]) -> str:
        made = {"model": each[0], "prompt": each[1], "max_tokens": 10}
        return (
            joined(client.completions.create(**made, stream=True))
            if each[2]
            else client.completions.create(**made).choices[0].text
        )

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, asked))
    assert found == [routed if who == "auto" else text for (who, _, _), text in zip(asked, wanted, strict=True)]
    assert served.free()


def test_the_router_chooses_and_says_how_sure_it_is(served: Live) -> None:
    raw = served.client().completions.with_raw_response.create(
        model="auto", prompt="what is 12 plus 345?", max_tokens=2
    )
    assert raw.parse().model == raw.headers["x-expert"] == "add"
    assert 0.5 < float(raw.headers["x-router-confidence"]) <= 1
    told = post(served, "route", {"messages": [{"role": "user", "content": "write pencil backwards"}]}).json()
    assert told["expert"] == "reverse" and sum(told["probabilities"].values()) == pytest.approx(1)
    assert post(served, "route", {"prompt": "write pencil backwards"}).json()["expert"] == "reverse"
    assert post(served, "route", {}).status_code == 400
    assert error_of(post(served, "completions", {"model": "auto", "prompt": [3, 4]}))["param"] == "model"


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(served: Live) -> None:
    client = served.client()
    for stop in ("d", ["db", "x"]):
        asked = {"model": "reverse", "prompt": PROMPT, "stop": stop}  # cadb
        whole = client.completions.create(**asked)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("ca", "stop")
        assert joined(client.completions.create(**asked, stream=True)) == "ca"
    assert served.free()


def test_several_answers_have_seeds_of_their_own_and_one_seed_repeats_them(served: Live) -> None:
    client = served.client()
    asked = {"model": "base", "prompt": "abc", "max_tokens": 8, "temperature": 2.0, "n": 3, "seed": 5}
    one, two = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in two.choices] and len(set(texts)) == 3
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    parts = ["", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == texts
    single = client.completions.create(**{**asked, "n": 1, "seed": 6})
    assert single.choices[0].text == texts[1]
    assert single.usage.prompt_tokens == one.usage.prompt_tokens == 3


def test_log_probabilities_are_of_the_tokens_that_are_shown(served: Live) -> None:
    client = served.client()
    asked = {"model": "reverse", "prompt": PROMPT, "logprobs": 2}
    found = client.completions.create(**asked).choices[0].logprobs
    assert found is not None and found.tokens == list("cadb") and found.text_offset == [0, 1, 2, 3]
    assert all(
        max(top.values()) == pytest.approx(own)
        for top, own in zip(found.top_logprobs, found.token_logprobs, strict=True)
    )
    streamed = [c.choices[0].logprobs for c in client.completions.create(**asked, stream=True)]
    assert [token for each in streamed if each for token in each.tokens] == found.tokens
    assert [offset for each in streamed if each for offset in each.text_offset] == found.text_offset
    chat = client.chat.completions.create(
        model="reverse", messages=[{"role": "user", "content": PROMPT}], logprobs=True, top_logprobs=1, stop="d"
    )
    content = chat.choices[0].logprobs.content
    assert [each.token for each in content] == ["c", "a"] and content[0].bytes == [99]
    assert [each.logprob for each in content] == pytest.approx(found.token_logprobs[:2], abs=1e-4)
    warm = client.completions.create(**asked, temperature=1.5, seed=1, logit_bias={"5": 100}).choices[0].logprobs
    assert warm.token_logprobs[0] < -1, "of the model, not of what was drawn from"


def test_prompts_come_in_four_forms_and_are_echoed(served: Live, expected: dict[str, str]) -> None:
    ids = served.host.tokenizer(None)(PROMPT)["input_ids"]
    client = served.client()
    for prompt in (PROMPT, ids, [PROMPT, PROMPT], [ids, ids]):
        found = client.completions.create(model="sort", prompt=prompt, echo=True)
        assert {choice.text for choice in found.choices} == {PROMPT + expected["sort"]}
        assert len(found.choices) == (
            2 if isinstance(prompt[0], list) or (isinstance(prompt, list) and isinstance(prompt[0], str)) else 1
        )
        assert joined(client.completions.create(model="sort", prompt=prompt, echo=True, stream=True)).startswith(PROMPT)


def test_penalties_and_bias_reach_the_model(served: Live) -> None:
    client = served.client()
    a = served.host.tokenizer(None)("a")["input_ids"][0]
    biased = client.completions.create(model="base", prompt=PROMPT, max_tokens=4, logit_bias={str(a): 100})
    assert biased.choices[0].text == "aaaa"
    spread = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=4, logit_bias={str(a): 40}, frequency_penalty=2.0, presence_penalty=2.0
    )
    assert spread.choices[0].text == "aaaa", "a penalty of 2 is less than a bias of 40"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_errors_are_the_clients_own_types(served: Live) -> None:
    client = served.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert "reverse" in missing.value.message
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="base", prompt="x", temperature=3)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="base", prompt="a" * 600, max_tokens=8)
    assert long.value.code == "context_length_exceeded" and "600" in long.value.message and "512" in long.value.message
    with pytest.raises(openai.NotFoundError) as responses:
        client.responses.create(model="base", input="x")
    assert "/v1/chat/completions" in responses.value.message
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="base", input="x")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[1]", None),
        (b"\xff\xfe", None),
        (b"[" * 200_000, None),
        (b'{"model": "base", "prompt": "\\ud800"}', None),
        ({"prompt": "x"}, "model"),
        ({"model": "base"}, "prompt"),
        ({"model": "base", "prompt": ""}, "prompt"),
        ({"model": "base", "prompt": []}, "prompt"),
        ({"model": "base", "prompt": [[]]}, "prompt"),
        ({"model": "base", "prompt": [64]}, "prompt"),
        ({"model": "base", "prompt": [-1]}, "prompt"),
        ({"model": "base", "prompt": [2**70]}, "prompt"),
        ({"model": "base", "prompt": "x", "n": 0}, "n"),
        ({"model": "base", "prompt": "x", "n": "2"}, "n"),
        ({"model": "base", "prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"model": "base", "prompt": "x", "top_p": 0}, "top_p"),
        ({"model": "base", "prompt": "x", "seed": 2**64}, "seed"),
        ({"model": "base", "prompt": "x", "stop": ["a"] * 5}, "stop"),
        ({"model": "base", "prompt": "x", "stop": ""}, "stop"),
        ({"model": "base", "prompt": "x", "logit_bias": {"64": 1}}, "logit_bias"),
        ({"model": "base", "prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"model": "base", "prompt": "x", "logprobs": 21}, "logprobs"),
        ({"model": "base", "prompt": "x", "logprobs": 1, "echo": True}, "logprobs"),
        ({"model": "base", "prompt": "x", "stream_options": {}}, "stream_options"),
        ({"model": "base", "prompt": "x", "suffix": "y"}, "suffix"),
        ({"model": "base", "prompt": "x", "unknown": 1}, "unknown"),
    ],
)
def test_what_is_wrong_is_named(served: Live, body: Any, param: str | None) -> None:
    answer = post(served, "completions", body)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "audio": 1}], "messages[1].audio"),
        ([{"role": "user", "content": ""}], "messages"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_conversation_is_named(served: Live, messages: Any, param: str) -> None:
    answer = post(served, "chat/completions", {"model": "base", "messages": messages})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


def test_other_addresses_are_answered_with_an_error_object(served: Live) -> None:
    assert error_of(httpx2.get(f"{served.at}nothing"))["code"] == "not_found"
    assert httpx2.get(f"{served.at}v1/completions").status_code == 405


def test_models_are_listed_with_where_they_are(served: Live) -> None:
    client = served.client()
    found = {each.id: each for each in client.models.list()}
    assert set(found) == {"base", "auto", *NAMES}
    assert found["add"].parent == "base" and found["add"].status in ("disk", "cpu", "device")
    assert client.models.retrieve("add").id == "add"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


# ---- clients that leave, limits, and a batch that dies ---------------------------------------------------------------


def test_a_client_that_leaves_frees_its_expert(served: Live) -> None:
    client = served.client()
    body = {"model": "reverse", "prompt": PROMPT, "max_tokens": 500, "logit_bias": {"1": -100}}
    stream = client.completions.create(**body, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{served.at}v1/completions", json=body, timeout=0.3)
    if type(served.engine.batcher).__name__ == "ContinuousBatcher":
        assert served.free(3), "long before its 500 tokens are written"
    assert served.free(20)


def test_a_key_is_needed_for_all_but_health(strict: Live) -> None:
    for key in ("k1", "k2"):
        assert next(iter(strict.client(api_key=key).models.list())).id == "base"
    with pytest.raises(openai.AuthenticationError):
        strict.client(api_key="k3").models.list()
    for path in ("v1/models/add", "metrics", "openapi.json"):
        assert httpx2.get(strict.at + path).status_code == 401, path
    for path in ("completions", "chat/completions", "load_expert", "unload_expert", "route"):
        assert post(strict, path, {}).status_code == 401, path
    assert httpx2.get(f"{strict.at}health").status_code == 200


def test_a_body_that_is_too_large_is_refused(strict: Live) -> None:
    answer = keyed(strict, {"model": "base", "prompt": "a" * 2000})
    assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"


LONG = {"model": "base", "prompt": "a", "max_tokens": 500, "logit_bias": {"1": -100}}


def test_a_request_that_takes_too_long_is_ended(strict: Live) -> None:
    answer = keyed(strict, LONG)
    assert answer.status_code == 504 and error_of(answer)["code"] == "timeout"
    lines = keyed(strict, {**LONG, "stream": True}).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    with pytest.raises(openai.APIError, match="took longer") as told:
        list(strict.client(api_key="k1").completions.create(**LONG, stream=True))
    assert told.value.code == "timeout"
    assert strict.free()


def test_a_full_queue_says_when_to_come_again(strict: Live) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: keyed(strict, {**LONG, "n": 2}), range(12)))
    full = [each for each in answers if each.status_code == 429]
    assert full and all(each.headers["retry-after"] == "1" for each in full)
    assert error_of(full[0])["type"] == "rate_limit_error"
    assert keyed(strict, {**LONG, "n": 4}).status_code == 429, "all or none"
    assert strict.free()


def test_a_lenient_server_accepts_what_nobody_knows(strict: Live) -> None:
    assert keyed(strict, {"model": "base", "prompt": PROMPT, "max_tokens": 2, "anything": 1}).status_code == 200


def test_the_log_has_a_line_of_json_a_request_and_prompts_where_asked(
    served: Live, strict: Live, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="tersor.experts.server"):
        served.client().completions.create(model="sort", prompt=PROMPT)
        keyed(strict, {"model": "sort", "prompt": PROMPT})
    quiet, told = [json.loads(record.message) for record in caplog.records if record.message.startswith("{")]
    assert quiet["expert"] == "sort" and quiet["prompt_tokens"] == 5 and quiet["completion_tokens"] == 5
    assert PROMPT not in json.dumps(quiet) and PROMPT in told["body"]


def test_metrics_count_bytes_requests_and_tokens(served: Live) -> None:
    def read() -> dict[str, float]:
        text = httpx2.get(f"{served.at}metrics").text
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in text.splitlines() if line[0] != "#")
        }

    before = read()
    served.client().completions.create(model="sort", prompt=PROMPT)
    after, report = read(), served.host.memory_report()
    for kind in ("prompt", "completion"):
        name = f'tersor_tokens_total{{expert="sort",kind="{kind}"}}'
        assert after[name] - before.get(name, 0) == 5
    sizes = [value for name, value in after.items() if name.startswith("tersor_expert_bytes")]
    assert after["tersor_base_bytes"] + sum(sizes) == report.total
    assert after["tersor_alive"] == 1 and after["tersor_waiting_requests"] == after["tersor_running_requests"] == 0


def test_the_document_describes_the_endpoints(served: Live, router: Router) -> None:
    found = httpx2.get(f"{served.at}openapi.json").json()
    fields = found["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for reference in re.findall(r'"\$ref": "#/([^"]*)"', json.dumps(found)):
        place = found
        for step in reference.split("/"):
            place = place[step]
    assert {"model", "prompt", "temperature"} <= set(fields["properties"]) and fields["required"] == ["model", "prompt"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_says_within_two_seconds_that_the_batching_thread_is_dead_and_that_another_one_runs(
    bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host(bank)

    def health(served: Live, status: int, seconds: float) -> float:
        began = time.monotonic()
        while httpx2.get(f"{served.at}health").status_code != status:
            assert time.monotonic() - began < seconds
            time.sleep(0.02)
        return time.monotonic() - began

    def fail(engine: Any) -> None:
        raise RuntimeError("no batch can be started")

    with live(host, make_batcher("continuous", host, places=2)) as served:
        health(served, 200, 1)
        with monkeypatch.context() as broken:
            broken.setattr(served.engine.batcher, "run", fail)  # of the next batch
            kill_batch(served.engine)
            assert health(served, 503, 2) < 2
        health(served, 200, 10)
        assert served.client().completions.create(model="sort", prompt=PROMPT).choices[0].text == "abcd"
        assert served.free() and served.engine.restarts >= 1
    host.close()
