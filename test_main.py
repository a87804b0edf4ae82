"""Every promise of the API, kept to a client that talks HTTP to a live server.

First the promises, then the contract, the edges, settings and documents, the walkthrough; what the
tests are made of comes last. `api` is a server in a thread of this process, where a test can change
the settings and the model; `start_worker` starts one as a process, which a test can kill. Both keep
predictions in `store`: fakeredis, and, when each test is run again, a real Redis that the tests
start themselves. Without a redis-server program on the machine, those second runs are skipped.
"""

import asyncio
import contextlib
import functools
import json
import os
import re
import runpy
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import types
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fakeredis
import nbformat
import pytest
import redis
import requests
import uvicorn
from nbclient import NotebookClient

import main

HERE = Path(__file__).parent
JSON = "application/json"
LONG = 20  # seconds that no wait in these tests should ever take
GRACE = "--timeout-graceful-shutdown=1"  # seconds until uvicorn cuts attempts short
PROCESSING = {"detail": "Prediction is still processing."}
UNAVAILABLE = {"detail": "Redis is unavailable."}

real = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="no redis-server program on this machine"
)


# --- The promises -----------------------------------------------------------------------------


def test_killed_worker_loses_nothing(start_worker, api):
    doomed = start_worker(PREDICTION_LATENCY=LONG, PREDICTION_TIMEOUT=1)
    paths = [accept(doomed.url, text) for text in "abcdefghij"]
    doomed.kill()
    done = poll_all(api, paths)
    assert [one["status"] for one in done] == ["completed"] * 10
    assert [one["output"]["input"] for one in done] == list("abcdefghij")
    assert poll_all(api, paths) == done


def test_prediction_that_kills_its_workers_is_failed(start_worker, api, store, calls):
    deadly = partial(start_worker, app="deadly:app", PREDICTION_TIMEOUT=0.2)
    main.settings.PREDICTION_ATTEMPTS = 2
    first = deadly()
    path = accept(first.url)
    first.process.wait(LONG)
    assert store.record(path)["attempt"] == 1
    second = deadly()
    wait_until(lambda: answers(second.url + path) is None)
    assert store.record(path)["attempt"] == 2
    assert poll(api, path)["status"] == "failed"
    assert calls == []


def test_first_output_is_final_when_two_attempts_race(api, store, monkeypatch):
    released = []

    async def model(text):
        number = len(arrived) + 1
        arrived.append(number)
        while number not in released:
            await asyncio.sleep(0.01)
        return f"Result {number}"

    arrived = []
    monkeypatch.setattr(main, "mock_model", model)
    path = accept(api)
    store.expire_lease(path)
    assert requests.get(api + path).status_code == 202
    wait_until(lambda: arrived == [1, 2])
    released.append(2)
    first = poll(api, path)
    assert first["output"]["result"] == "Result 2"
    released.append(1)
    attempts_have_ended()
    assert requests.get(api + path).json() == first


def test_worker_told_to_stop_finishes_first(start_worker, api, store):
    worker = start_worker(PREDICTION_LATENCY=0.5)
    path = accept(worker.url)
    worker.stop()
    assert requests.get(api + path).json()["status"] == "completed"
    assert f"Predictions are kept in Redis at 127.0.0.1:{store.port}." in worker.log()


def test_worker_cut_short_hands_its_predictions_back(start_worker, api, store):
    hasty = start_worker(GRACE, PREDICTION_LATENCY=500, PREDICTION_TIMEOUT=600)
    paths = [accept(hasty.url) for _ in range(10)]
    assert {requests.get(api + path).status_code for path in paths} == {202}
    hasty.stop()
    assert [one["status"] for one in poll_all(api, paths)] == ["completed"] * 10


def test_worker_cut_short_leaves_the_lease_of_another_alone(start_worker, store):
    hasty = start_worker(GRACE, PREDICTION_LATENCY=500, PREDICTION_TIMEOUT=600)
    path = accept(hasty.url)
    store.lease(path, "another worker")
    hasty.stop()
    assert store.get(path, ":lease") == "another worker"


@real
def test_redis_killed_and_back_loses_nothing(redis_server, api_on, caplog):
    api = api_on(redis_server, PREDICTION_LATENCY=0.7, PREDICTION_TIMEOUT=1)
    paths = [accept(api, text) for text in "abcdefghij"]
    redis_server.kill()
    for request in (partial(requests.get, api + paths[0]), partial(predict, api)):
        duration, response = timed(request)
        assert (response.status_code, response.json()) == (503, UNAVAILABLE)
        assert response.headers["Retry-After"] == "1"
        assert duration < 2
    assert requests.get(api).status_code == 200
    wait_until(
        lambda: caplog.text.count("an attempt is lost") == 10
    )  # the outputs had nowhere to go
    redis_server.start()
    done = poll_all(api, paths)
    assert [one["status"] for one in done] == ["completed"] * 10
    assert [one["output"]["input"] for one in done] == list("abcdefghij")


@real
def test_frozen_redis_is_503_within_5_s(redis_server, api_on):
    api = api_on(redis_server, PREDICTION_LATENCY=0)
    path = accept(api)
    assert poll(api, path)["status"] == "completed"
    redis_server.process.send_signal(signal.SIGSTOP)
    results = at_once(100, timed, requests.get, api + path)
    assert {response.status_code for _, response in results} == {503}
    assert max(duration for duration, _ in results) < 5
    assert requests.get(api).status_code == 200
    redis_server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: requests.get(api + path).status_code == 200)


@real
def test_failover_is_followed(redis_server, tmp_path, api_on):
    old = redis_server
    with RedisServer(tmp_path / "new") as new, forwarder(old.port) as name:
        api = api_on(name, PREDICTION_LATENCY=0)
        new.client.replicaof("127.0.0.1", old.port)
        path = accept(api)
        poll(api, path)
        wait_until(lambda: new.client.exists(key_of(path) + ":output"))
        new.client.replicaof("NO", "ONE")
        old.client.replicaof("127.0.0.1", new.port)
        name.target = new.port  # for new connections; the old ones stay where they are
        wait_until(lambda: predict(api).status_code == 200)
        assert requests.get(api + path).status_code == 200


@real
def test_burst_is_served_at_once_over_few_connections(redis_server, api_on):
    api = api_on(redis_server, PREDICTION_LATENCY=1)
    start = time.monotonic()
    with ThreadPoolExecutor(200) as pool:
        futures = [pool.submit(predict, api) for _ in range(200)]
        wait_until(lambda: len(redis_server.client.keys("*:lease")) == 200)
        assert redis_server.client.info("clients")["connected_clients"] < 5
    assert {future.result().status_code for future in futures} == {200}
    assert time.monotonic() - start < 20  # a hundredth of one after the other


def test_without_redis_the_api_says_so_and_does_its_job(start_worker):
    port = free_port()
    worker = start_worker(REDIS_PORT=port, PREDICTION_LATENCY=0.1)
    path = accept(worker.url)
    assert poll(worker.url, path)["status"] == "completed"
    worker.stop()
    assert worker.log().count("WARNING") == 1
    assert f"No Redis answers at localhost:{port}" in worker.log()
    assert "Set REDIS_HOST" in worker.log()
    assert "Traceback" not in worker.log()


# --- The contract -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [("/", "Welcome to the Mock Model API!"), ("/favicon.ico", "No favicon")],
)
def test_message(api, path, message):
    response = requests.get(api + path)
    assert (response.status_code, response.json()) == (200, {"message": message})


def test_synchronous_prediction_is_completed_and_kept(api, store):
    response = predict(api)
    assert response.status_code == 200
    prediction = response.json()
    prediction_id, result = prediction["prediction_id"], prediction["output"]["result"]
    assert uuid.UUID(prediction_id).version == 4
    assert isinstance(result, str)
    output = {"status": "completed", "input": "Some input data", "result": result}
    assert prediction == {"prediction_id": prediction_id, "status": "completed", "output": output}
    path = f"/predict/{prediction_id}"
    record = {"status": "processing", "input": "Some input data", "attempt": 1}
    assert store.record(path) == record
    assert json.loads(store.get(path, ":output")) == output
    later = requests.get(api + path)
    assert (later.status_code, later.json()) == (200, prediction)


def test_asynchronous_prediction_is_accepted_then_processing_then_completed(api, store):
    main.settings.PREDICTION_LATENCY = 0.5
    accepted = predict(api, async_mode="true")
    assert accepted.status_code == 202
    prediction_id = accepted.json()["prediction_id"]
    path = f"/predict/{prediction_id}"
    message = "Request received. Processing asynchronously."
    assert accepted.json() == {"message": message, "prediction_id": prediction_id}
    assert accepted.headers["Location"] == path
    pending = requests.get(api + path)
    assert (pending.status_code, pending.json()) == (202, PROCESSING)
    assert pending.headers["Retry-After"] == "1"
    record = {"status": "processing", "input": "Some input data", "attempt": 1}
    assert store.record(path) == record
    assert store.get(path, ":lease") == main.WORKER
    assert store.get(path, ":output") is None
    done = poll(api, path)
    output = json.loads(store.get(path, ":output"))
    assert done == {"prediction_id": prediction_id, "status": "completed", "output": output}


@pytest.mark.parametrize("name", ["async_mode", "Async-Mode"])
@pytest.mark.parametrize(("value", "status"), [("true", 202), ("false", 200), ("maybe", 422)])
def test_mode_header(api, name, value, status):
    response = predict(api, **{name: value})
    assert response.status_code == status
    if status == 422:
        [error] = response.json()["detail"]
        assert error["loc"] == ["header", name]


GOOD_INPUTS = {
    "nothing": "",
    "NUL": "a\0b",
    "white space and quotes": "\u2028\r\n\t\"\\'",
    "any Unicode": "Zoë 🚀 \U0010ffff",
    "10,000 characters": "🚀" * 10_000,
}


@pytest.mark.parametrize("name", GOOD_INPUTS)
def test_input_is_kept_exactly(api, name):
    text = GOOD_INPUTS[name]
    assert predict(api, text).json()["output"]["input"] == text
    assert poll(api, accept(api, text))["output"]["input"] == text


def test_poll_of_unknown_id_is_404(api):
    response = requests.get(f"{api}/predict/{uuid.uuid4()}")
    assert response.status_code == 404
    assert response.json() == {"detail": "Prediction not found."}


def test_poll_of_expired_prediction_is_404(api):
    main.settings.PREDICTION_TTL = 1
    path = f"/predict/{predict(api).json()['prediction_id']}"
    assert requests.get(api + path).status_code == 200
    wait_until(lambda: requests.get(api + path).status_code == 404)


def test_every_key_expires(api, store):
    main.settings.PREDICTION_TTL, main.settings.PREDICTION_TIMEOUT = 1000, 50
    poll(api, accept(api))
    lives = sorted(store.client.pttl(key) / 1000 for key in store.client.scan_iter())
    assert len(lives) == 3
    assert 50.5 < lives[0] <= 51  # the lease outlasts the attempt by a second
    assert 990 < lives[1] <= lives[2] <= 1000


@pytest.mark.parametrize("name", ["secret", "%00", "%ff", "x" * 5_000])
def test_poll_of_no_uuid_is_422(api, name):
    response = requests.get(f"{api}/predict/{name}")
    assert response.status_code == 422
    [error] = response.json()["detail"]
    assert error["loc"] == ["path", "prediction_id"]
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/predict", 405), ("PUT", "/", 405), ("POST", "/predict/", 404), ("GET", "/no", 404)],
)
def test_wrong_method_or_path(api, method, path, status):
    response = requests.request(method, api + path)
    assert response.status_code == status
    assert isinstance(response.json()["detail"], str)


BAD_BODIES = {
    "nothing": (b"", JSON),
    "no input": (b"{}", JSON),
    "a number": (b'{"input": 1}', JSON),
    "10,001 characters": (b'{"input": "%s"}' % (b"x" * 10_001), JSON),
    "half a body": (b'{"input": "secret"', JSON),
    "another type": (b'{"input": "secret"}', "text/plain"),
    "NaN": (b'{"input": NaN}', JSON),
    "a number too large": (b'{"input": 1e999}', JSON),
    "a lone surrogate": (b'{"input": "secret \\ud800"}', JSON),
    "a lone surrogate as a key": (b'{"secret \\ud800": "secret"}', JSON),
    "no UTF-8": (b'{"input": "secret \xff"}', JSON),
    "no UTF-8 in another type": (b"secret \xff", "text/plain"),
    "100,000 brackets": (b"[" * 100_000, JSON),
    "5 MB": (b'{"input": "%s"}' % (b"x" * 5_000_000), JSON),
}


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize("sent", ["whole", "in chunks"])
def test_bad_body_is_4xx_and_not_repeated(api, store, name, sent):
    body, content_type = BAD_BODIES[name]
    chunks = (body[start : start + 65_536] for start in range(0, len(body), 65_536))
    response = requests.post(
        f"{api}/predict",
        data=chunks if sent == "in chunks" else body,
        headers={"Content-Type": content_type, "async_mode": "true"},
    )
    assert response.status_code in (400, 413, 422)
    assert "secret" not in response.text
    assert len(response.content) < 300
    if response.status_code != 413 or sent == "in chunks":
        assert response.json()["detail"]
    assert store.client.keys() == []


@pytest.mark.skipif(
    "max_body_size" not in main.FastAPI.__init__.__annotations__,
    reason="this FastAPI has no limit for bodies",
)
def test_body_over_1_mb_is_413(api):
    for size, status in ((1_000_000, 422), (1_000_001, 413)):
        body = b'{"input": "%s"}' % (b"x" * (size - 13))
        response = requests.post(f"{api}/predict", data=body, headers={"Content-Type": JSON})
        assert (len(body), response.status_code) == (size, status)


# --- Models that misbehave --------------------------------------------------------------------


class Panic(BaseException):  # Rust extensions raise such
    pass


async def raising(error):
    raise error


async def cancelling_itself(task):
    task.cancel()
    return "no await follows"


async def returning(value):
    return value


async def yielding(value):
    yield value


async def ignoring_its_cancellation():
    end = time.monotonic() + 1
    while time.monotonic() < end:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)
    return "too late"


MISBEHAVING_MODELS = {
    "raises": lambda text: raising(ValueError(text)),
    "raises no Exception": lambda text: raising(Panic(text)),
    "raises GeneratorExit": lambda text: raising(GeneratorExit()),
    "raises CancelledError": lambda text: raising(asyncio.CancelledError()),
    "cancels itself": lambda text: cancelling_itself(asyncio.current_task()),
    "exits": lambda text: raising(SystemExit(1)),
    "hangs": lambda text: asyncio.Event().wait(),
    "ignores its cancellation": lambda text: ignoring_its_cancellation(),
    "is a plain function": lambda text: text,
    "is a generator": lambda text: yielding(text),
    "returns nothing": lambda text: returning(None),
    "returns no text": lambda text: returning(42),
    "returns half a character": lambda text: returning("\ud800"),
}


@pytest.mark.parametrize("name", MISBEHAVING_MODELS)
def test_prediction_of_a_model_that_misbehaves_is_failed(api, store, monkeypatch, caplog, name):
    main.settings.PREDICTION_TIMEOUT = 0.2
    monkeypatch.setattr(main, "mock_model", MISBEHAVING_MODELS[name])
    response = predict(api)
    assert (response.status_code, response.json()) == (500, {"detail": "Prediction failed."})
    done = poll(api, accept(api))
    output = {"status": "failed", "input": "Some input data", "result": None}
    assert (done["status"], done["output"]) == ("failed", output)
    assert [json.loads(store.client.get(key)) for key in store.client.keys("*:output")] == [
        output
    ] * 2
    assert len([record for record in caplog.records if record.exc_info]) >= 2
    assert "Traceback" in caplog.text


def test_model_that_hangs_is_cancelled(api, monkeypatch):
    cancelled = []

    async def model(text):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(text)

    main.settings.PREDICTION_TIMEOUT = 0.2
    monkeypatch.setattr(main, "mock_model", model)
    assert predict(api).status_code == 500
    wait_until(lambda: cancelled == ["Some input data"])


def test_result_that_was_there_when_the_worker_froze_counts(api, monkeypatch):
    async def model(text):
        asyncio.get_running_loop().call_soon(time.sleep, 0.6)  # as if frozen
        await asyncio.sleep(0.1)
        return "in time"

    main.settings.PREDICTION_TIMEOUT = 0.3
    monkeypatch.setattr(main, "mock_model", model)
    assert predict(api).json()["output"]["result"] == "in time"


# --- Leases and attempts ----------------------------------------------------------------------


def test_orphan_is_taken_over_by_one_poll_of_many(api, store, calls):
    main.settings.PREDICTION_LATENCY = 0.3
    path = store.leave_orphan()
    assert {response.status_code for response in at_once(20, requests.get, api + path)} == {202}
    assert poll(api, path)["status"] == "completed"
    assert calls == ["orphan"]
    assert store.record(path)["attempt"] == 2


def test_prediction_with_a_lease_is_not_taken_over(api, store, calls):
    path = store.leave_orphan()
    store.lease(path, "another worker")
    assert requests.get(api + path).status_code == 202
    attempts_have_ended()
    assert calls == []


def overtaken(monkeypatch, meanwhile, before="take_lease"):
    """Let something happen between a poll and a step of the attempt that it starts."""
    step = getattr(main, before)

    async def too_late(*args):
        meanwhile()
        return await step(*args)

    monkeypatch.setattr(main, before, too_late)


def test_lease_that_another_poll_takes_first_is_left_to_it(api, store, calls, monkeypatch):
    path = store.leave_orphan()
    overtaken(monkeypatch, lambda: store.lease(path, "another worker"))
    assert requests.get(api + path).status_code == 202
    attempts_have_ended()
    assert store.get(path, ":lease") == "another worker"
    assert calls == []


def test_attempts_are_counted_by_who_holds_the_lease(api, store, calls, monkeypatch):
    path = store.leave_orphan(attempt=1)
    overtaken(monkeypatch, lambda: store.leave_orphan(path, attempt=3))
    assert poll(api, path)["status"] == "failed"
    assert calls == []


def test_attempt_that_another_worker_has_counted_is_left_to_it(api, store, calls, monkeypatch):
    path = store.leave_orphan(attempt=1)
    overtaken(monkeypatch, lambda: store.leave_orphan(path, attempt=2), before="replace")
    assert requests.get(api + path).status_code == 202
    attempts_have_ended()
    assert store.record(path)["attempt"] == 2
    assert calls == []


def test_prediction_that_expires_meanwhile_is_not_made_again(api, store, calls, monkeypatch):
    path = store.leave_orphan()
    overtaken(monkeypatch, lambda: store.client.delete(key_of(path)))
    assert requests.get(api + path).status_code == 202
    attempts_have_ended()
    assert requests.get(api + path).status_code == 404
    assert calls == []


def test_synchronous_answer_is_the_first_output(api, store, monkeypatch):
    async def model(text):
        [key] = [key for key in store.client.scan_iter() if not key.endswith(":lease")]
        output = main.Output(status="completed", input=text, result="The other one")
        store.client.set(f"{key}:output", output.model_dump_json())
        return "Mine"

    monkeypatch.setattr(main, "mock_model", model)
    assert predict(api).json()["output"]["result"] == "The other one"


def test_one_round_trip_before_an_answer(api, store, monkeypatch):
    if store.name == "fakeredis":
        pytest.skip("the imitation takes no round trips")
    main.settings.PREDICTION_LATENCY = 0.5
    round_trips = []
    execute = redis.asyncio.client.Pipeline.execute

    def counted(pipeline, *args, **kwargs):
        round_trips.append(len(pipeline))
        return execute(pipeline, *args, **kwargs)

    monkeypatch.setattr(redis.asyncio.client.Pipeline, "execute", counted)
    path = accept(api)
    assert round_trips == [2]
    assert requests.get(api + path).status_code == 202
    assert round_trips == [2, 1]
    attempts_have_ended()
    assert round_trips == [2, 1, 1]
    assert requests.get(api + path).status_code == 200
    assert round_trips == [2, 1, 1, 1]


# --- Redis that misbehaves --------------------------------------------------------------------


@real
def test_redis_restarted_between_two_requests_goes_unnoticed(redis_server, api_on):
    api = api_on(redis_server, PREDICTION_LATENCY=0)
    path = accept(api)
    before = poll(api, path)
    redis_server.kill()
    redis_server.start()
    assert requests.get(api + path).json() == before


@real
def test_redis_that_is_full_is_503_until_there_is_room(redis_server, api_on):
    api = api_on(redis_server, PREDICTION_LATENCY=0)
    redis_server.client.config_set("maxmemory", 1)
    response = predict(api)
    assert (response.status_code, response.json()) == (503, UNAVAILABLE)
    redis_server.client.config_set("maxmemory", 0)
    assert predict(api).status_code == 200


@real
def test_api_that_starts_before_its_redis_recovers(redis_server, api_on, caplog):
    redis_server.kill()
    api = api_on(redis_server, PREDICTION_LATENCY=0)
    address = f"127.0.0.1:{redis_server.port}"
    assert f"Redis at {address} is unavailable" in caplog.text
    assert predict(api).status_code == 503
    redis_server.start()
    assert predict(api).status_code == 200


def test_redis_that_does_not_accept_connections_is_503_within_2_s(api_on):
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # more than fit into its queue, so that the next one gets no answer
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        api = api_on(Address(listener.getsockname()[1]))
        duration, response = timed(predict, api)
    assert (response.status_code, response.json()) == (503, UNAVAILABLE)
    assert duration < 2


@real
def test_redis_with_tls_and_a_user(redis_server, api_on, certificate, monkeypatch, caplog):
    tls_port = free_port()
    redis_server.kill()
    redis_server.start("--tls-port", tls_port, *certificate.options)
    redis_server.client.acl_setuser(
        "api", enabled=True, passwords="+swordfish", keys="*", commands=["+@all"]
    )
    address = Address(tls_port, host="localhost")
    right = {"REDIS_TLS": True, "REDIS_USERNAME": "api", "REDIS_PASSWORD": "swordfish"}
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
    assert predict(api_on(address, PREDICTION_LATENCY=0, **right)).status_code == 200
    wrong = Address(tls_port), dict(right, REDIS_PASSWORD="sardine"), dict(right, REDIS_USERNAME="")
    for host, settings in ((wrong[0], right), (address, wrong[1]), (address, wrong[2])):
        response = predict(api_on(host, **settings))
        assert (response.status_code, response.json()) == (503, UNAVAILABLE)
    monkeypatch.delenv("SSL_CERT_FILE")
    assert predict(api_on(address, **right)).status_code == 503
    assert "swordfish" not in caplog.text


@real
def test_no_connection_is_left_open(redis_server, monkeypatch):
    async def connections_become(number):
        deadline = time.monotonic() + LONG
        while len(redis_server.client.client_list()) != number:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    async def run():
        before, app = len(redis_server.client.client_list()), main.FastAPI()
        async with main.lifespan(app):  # finds the Redis, without a REDIS_HOST
            await connections_become(before + 1)
        await connections_become(before)
        return app  # and its client: not closed by being collected

    settings = main.Settings.model_construct(REDIS_PORT=redis_server.port)
    monkeypatch.setattr(main, "settings", settings)
    asyncio.run(run())


def in_a_loop(function, port):
    """Run function(client), where client is a BatchingRedis."""

    async def run():
        client = main.BatchingRedis(port=port)
        try:
            return await asyncio.wait_for(function(client), LONG)
        finally:
            await client.aclose()

    return asyncio.run(run())


@real
def test_no_reply_is_mixed_up_among_errors_and_cancellations(redis_server):
    async def run(client):
        await client.set("text", "not a number")
        tasks = [
            asyncio.ensure_future(client.echo(str(number)) if number % 100 else client.incr("text"))
            for number in range(2_000)
        ]
        await asyncio.sleep(0)
        for task in tasks[50::100]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    for number, reply in enumerate(in_a_loop(run, redis_server.port)):
        if number % 100 == 50:
            assert isinstance(reply, asyncio.CancelledError)
        elif number % 100 == 0:
            assert isinstance(reply, redis.ResponseError)
        else:
            assert reply == str(number).encode()


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError, redis.TimeoutError])
def test_whatever_fails_in_a_batch_nobody_is_left_waiting(store, monkeypatch, error):
    async def fails(*args, **kwargs):
        raise error("as when a connection was reset")

    async def run(client):
        with monkeypatch.context() as patch:
            patch.setattr(redis.asyncio.client.Pipeline, "execute", fails)
            with pytest.raises(redis.RedisError, match=r"reset|Cancelled"):
                await client.ping()
        return await client.ping()

    assert in_a_loop(run, store.port)


# --- Settings and documents -------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_env_file_is_read_and_its_unknown_keys_are_ignored(tmp_path, monkeypatch, encoding):
    text = "PREDICTION_LATENCY=0.1\nPREDICTION_TTL=50\nSOMETHING=else\nREDIS_USERNAME=Zoë\n"
    (tmp_path / ".env").write_text(text, encoding=encoding)
    shutil.copy(str(HERE / "main.py"), str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)  # it is found beside main.py, not where one happens to be
    monkeypatch.setattr(os, "environ", clean_environment(PREDICTION_TTL=60))
    settings = runpy.run_path(str(tmp_path / "main.py"))["settings"]
    assert (settings.PREDICTION_LATENCY, settings.PREDICTION_TTL) == (0.1, 60)
    assert (settings.REDIS_USERNAME, settings.REDIS_PORT) == ("Zoë", 6379)


BAD_SETTINGS = {
    "REDIS_HOST": [""],
    "REDIS_PORT": ["0", "65536", "six"],
    "REDIS_TLS": ["perhaps"],
    "PREDICTION_LATENCY": ["-1", "nan", "inf"],
    "PREDICTION_TIMEOUT": ["0", "nan", "inf", ""],
    "PREDICTION_ATTEMPTS": ["0", "1.5"],
    "PREDICTION_TTL": ["0", "1.5", "1e99"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in BAD_SETTINGS for value in BAD_SETTINGS[name]]
)
def test_bad_setting_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        main.Settings(_env_file=None)


def test_lowest_settings_are_accepted():
    lowest = {"REDIS_PORT": 1, "PREDICTION_LATENCY": 0, "PREDICTION_TIMEOUT": 0.001}
    main.Settings(_env_file=None, **lowest, PREDICTION_ATTEMPTS=1, PREDICTION_TTL=1)


def test_bad_setting_stops_the_start(start_worker):
    with pytest.raises(AssertionError, match="REDIS_PORT") as error:
        start_worker(REDIS_PORT="six", REDIS_PASSWORD="swordfish")
    assert "swordfish" not in str(error.value)


def test_env_example_lists_every_setting_at_its_default(monkeypatch):
    text = (HERE / ".env.example").read_text(encoding="utf-8")
    assert all(line.startswith("#") for line in text.splitlines() if line)
    lines = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", text, re.MULTILINE))
    assert list(lines) == list(main.Settings.model_fields)
    for name in lines:
        monkeypatch.delenv(name, raising=False)
    defaults = main.Settings(_env_file=None)
    for name, value in lines.items():
        monkeypatch.setenv(name, value)
    assert main.Settings(_env_file=None) == defaults


def test_openapi_declares_every_status_with_its_model(api):
    declared = {}
    for operations in requests.get(f"{api}/openapi.json").json()["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                schema = response["content"][JSON]["schema"]["$ref"].rsplit("/", 1)[1]
                headers = "".join(f" {name}" for name in response.get("headers", {}))
                declared[f"{operation['operationId']} {status}"] = schema + headers
    assert declared == {
        "read_root 200": "Message",
        "read_favicon 200": "Message",
        "create_prediction 200": "Prediction",
        "create_prediction 202": "Accepted Location",
        "create_prediction 400": "Detail",
        "create_prediction 413": "Detail",
        "create_prediction 422": "Invalid",
        "create_prediction 500": "Detail",
        "create_prediction 503": "Detail Retry-After",
        "read_prediction 200": "Prediction",
        "read_prediction 202": "Detail Retry-After",
        "read_prediction 404": "Detail",
        "read_prediction 422": "Invalid",
        "read_prediction 503": "Detail Retry-After",
    }


def test_openapi_describes_parameters_and_has_an_example_that_works(api):
    document = requests.get(f"{api}/openapi.json").json()
    parameters = [
        parameter
        for operations in document["paths"].values()
        for operation in operations.values()
        for parameter in operation.get("parameters", [])
    ]
    assert [parameter["name"] for parameter in parameters] == ["async_mode", "prediction_id"]
    assert all(parameter["description"] for parameter in parameters)
    schema = document["components"]["schemas"]["PredictionRequest"]
    [example] = schema["properties"]["input"]["examples"]
    assert predict(api, example).status_code == 200
    assert requests.get(f"{api}/docs").status_code == 200


# --- The walkthrough --------------------------------------------------------------------------


def test_walkthrough_with_an_api_leaves_it_running(walk):
    run = walk("with an API")
    assert run.error is None
    assert run.answer.status_code == 200


def test_walkthrough_without_an_api_leaves_nothing_running(walk):
    run = walk("interrupted, and with pauses")
    assert run.error is None
    assert run.answer is None


def test_walkthrough_survives_interruptions_and_pauses(walk):
    run = walk("interrupted, and with pauses")
    for interrupted in ("interrupt-start", "interrupt-in-a-row"):
        assert run.output(interrupted).endswith("KeyboardInterrupt")
    assert re.search("attempt.*lease.* 202\n.* 200\n", run.output("survived"), re.DOTALL)
    assert "2nd worker" in run.output("lease")


def test_walkthrough_that_fails_leaves_nothing_running(walk):
    run = walk("fails")
    assert "this cell fails" in run.error
    assert run.answer is None


def test_walkthrough_takes_no_other_server_for_the_api(walk):
    run = walk("with another server")
    assert f"Stop the other server at {run.url}, or set API_URL." in run.error


def test_walkthrough_cell_that_is_run_first_says_what_to_run(monkeypatch):
    monkeypatch.chdir(HERE)
    for cell in code_cells(notebook())[1:]:
        if "assert " in cell.source:
            with pytest.raises(AssertionError, match="Run the cells above"):
                exec(cell.source, {})


# --- What the tests are made of: verbs --------------------------------------------------------


def predict(api, text="Some input data", **headers):
    return requests.post(f"{api}/predict", json={"input": text}, headers=headers, timeout=LONG)


def accept(api, text="Some input data"):
    """Have a prediction accepted; return its path."""
    response = predict(api, text, async_mode="true")
    assert response.status_code == 202
    return response.headers["Location"]


def poll(api, path):
    """Return the prediction once it is ready."""

    def ready():
        response = requests.get(api + path, timeout=LONG)
        assert response.status_code in (200, 202)
        return response.json() if response.status_code == 200 else None

    return wait_until(ready)


def poll_all(api, paths):
    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(partial(poll, api), paths))


def wait_until(condition, seconds=LONG):
    """Return the first true value of condition(), or fail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {condition}")


def answers(url):
    """Return the answer of a server, or None if there is none."""
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(url, timeout=LONG)


def at_once(number, function, *args):
    with ThreadPoolExecutor(number) as pool:
        return [future.result() for future in [pool.submit(function, *args) for _ in range(number)]]


def timed(function, *args):
    """Return how many seconds function(*args) took, and what it returned."""
    start = time.monotonic()
    value = function(*args)
    return time.monotonic() - start, value


def key_of(path):
    return path.replace("/predict/", "prediction:")


def clean_environment(**settings):
    """Return this environment, with these settings and no others."""
    names = main.Settings.model_fields
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return dict(clean, **{name: str(value) for name, value in settings.items()})


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# --- What the tests are made of: stores -------------------------------------------------------


class Address:
    """Where a Redis is, or is said to be."""

    def __init__(self, port, host="127.0.0.1"):
        self.port, self.settings = port, {"REDIS_HOST": host, "REDIS_PORT": port}


class RedisServer(Address):
    """A real Redis, which keeps what it holds in a folder."""

    def __init__(self, folder):
        super().__init__(free_port())
        folder.mkdir()
        self.folder, self.client = folder, redis.Redis(port=self.port, decode_responses=True)
        self.start()

    def start(self, *options):
        options = ("--port", self.port, "--save", "", "--appendonly", "yes", *options)
        options += ("--repl-diskless-sync-delay", 0)  # for the replica of a failover
        command = ["redis-server", *map(str, options)]
        self.process = subprocess.Popen(command, cwd=str(self.folder), stdout=subprocess.DEVNULL)

        def ready():
            with contextlib.suppress(redis.ConnectionError):
                return self.client.ping()

        wait_until(ready)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self.client.close()


@pytest.fixture
def redis_server(tmp_path):
    with RedisServer(tmp_path / "redis") as server:
        yield server


class Store(Address):
    """What holds the predictions of a test, with words for what the test does to it."""

    def __init__(self, name, port, client, **settings):
        super().__init__(port)
        self.name, self.client = name, client

    def get(self, path, suffix=""):
        return self.client.get(key_of(path) + suffix)

    def record(self, path):
        return json.loads(self.get(path))

    def set(self, path, suffix, value):
        self.client.set(key_of(path) + suffix, value, ex=100)

    def lease(self, path, worker):
        self.set(path, ":lease", worker)

    def expire_lease(self, path):
        self.client.delete(key_of(path) + ":lease")

    def leave_orphan(self, path=None, attempt=1):
        """Leave what a killed worker leaves, after its lease has run out; return the path."""
        path = path or f"/predict/{uuid.uuid4()}"
        self.set(path, "", main.Record(input="orphan", attempt=attempt).model_dump_json())
        return path


@pytest.fixture(params=["fakeredis", pytest.param("redis-server", marks=real)])
def store(request, monkeypatch):
    """An empty store that outlives its workers; the API in the thread embeds the fakeredis."""
    if request.param == "redis-server":
        server = request.getfixturevalue("redis_server")
        yield Store(request.param, server.port, server.client)
        return
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0))
    server.daemon_threads = True  # its threads do not all notice that a client is gone
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    client = fakeredis.FakeRedis(server=server.fake_server, decode_responses=True)
    embedded = partial(main.FakeAsyncRedis, server=server.fake_server)
    monkeypatch.setattr(main, "FakeAsyncRedis", embedded)
    store = Store(request.param, server.server_address[1], client)
    yield store
    client.close()
    server.shutdown()
    server.server_close()


class Forward(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(("127.0.0.1", self.server.target)) as other:
            ends = {self.request: other, other: self.request}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(65_536)
                    if not data:
                        return
                    ends[end].sendall(data)


@contextlib.contextmanager
def forwarder(target):
    """Stand for a name that leads to a Redis: a new connection goes to the port .target."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward) as server:
        server.daemon_threads, server.target = True, target
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.settings = Address(server.server_address[1]).settings
        yield server
        server.shutdown()


@pytest.fixture
def certificate(tmp_path):
    """The path of a certificate for localhost that is its own authority, and a Redis's options."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl program on this machine")
    path, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    options = f"-x509 -newkey rsa:2048 -nodes -keyout {key} -out {path} -days 2 -subj /CN=localhost"
    command = ["openssl", "req", *options.split(), "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    options = ("--tls-cert-file", path, "--tls-key-file", key, "--tls-auth-clients", "no")
    return types.SimpleNamespace(path=path, options=options)


# --- What the tests are made of: APIs ---------------------------------------------------------

SERVER = uvicorn.Server(
    uvicorn.Config(main.app, port=0, ws="none", log_config=None, access_log=False)
)


def attempts_have_ended():
    """Wait for all requests to the server in the thread and for their background tasks."""
    wait_until(lambda: not SERVER.server_state.tasks)


@pytest.fixture(scope="session")
def server():
    """The URL and the event loop of the API that runs in a thread until all tests are done."""
    loops = []

    async def serve():
        loops.append(asyncio.get_event_loop())
        await SERVER.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "settings", main.Settings(_env_file=None, REDIS_PORT=free_port()))
        thread.start()
        wait_until(lambda: SERVER.started)
    yield f"http://127.0.0.1:{SERVER.servers[0].sockets[0].getsockname()[1]}", loops[0]
    SERVER.should_exit = True
    thread.join(LONG)
    assert not thread.is_alive()


@pytest.fixture
def api_on(server, monkeypatch):
    """Let the API use a Redis: api_on(where, A_SETTING=its_value) returns the URL of the API."""
    url, loop = server
    clients = []

    def on(address, **settings):
        for name in main.Settings.model_fields:
            monkeypatch.delenv(name, raising=False)
        settings = main.Settings(_env_file=None, **dict(address.settings, **settings))
        monkeypatch.setattr(main, "settings", settings)
        clients.append(asyncio.run_coroutine_threadsafe(main.connect(), loop).result(LONG))
        main.app.state.redis = clients[-1]
        return url

    yield on
    attempts_have_ended()
    for client in clients:
        asyncio.run_coroutine_threadsafe(client.aclose(), loop).result(LONG)


@pytest.fixture
def api(store, api_on):
    """The URL of a live API on the store; a test can change main.settings and the model."""
    if store.name == "fakeredis":  # is embedded where REDIS_HOST is not set and nothing answers
        store = types.SimpleNamespace(settings={"REDIS_PORT": free_port()})
    return api_on(store, PREDICTION_LATENCY=0.05)


@pytest.fixture
def calls(monkeypatch):
    """The inputs that the model was given, in order."""
    calls = []
    mock_model = main.mock_model

    async def model(text):
        calls.append(text)
        return await mock_model(text)

    monkeypatch.setattr(main, "mock_model", model)
    return calls


class Worker:
    """An API process, which can be killed."""

    def __init__(self, app, folder, log, options, environment):
        port = free_port()
        self.url, self.log_file = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(port), *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=str(folder), env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def log(self):
        return self.log_file.read_text()

    def wait_until_it_answers(self):
        wait_until(lambda: answers(self.url) or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        assert self.process.wait(LONG) in (0, -signal.SIGTERM)


KILLS_ITS_WORKER = """
import asyncio, os
import main

async def mock_model(text):
    await asyncio.sleep(0.1)
    os._exit(1)

main.mock_model = mock_model
app = main.app
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a copy of main.py, and without the .env that may be beside the original."""
    folder = tmp_path_factory.mktemp("app")
    shutil.copy(str(HERE / "main.py"), str(folder))
    (folder / "deadly.py").write_text(KILLS_ITS_WORKER)
    return folder


@pytest.fixture
def start_worker(folder, tmp_path, request):
    """Start an API process: start_worker("--an-option-of-uvicorn", A_SETTING=its_value)."""
    workers = []

    def start(*options, app="main:app", **settings):
        if "store" in request.fixturenames:
            settings = dict(request.getfixturevalue("store").settings, **settings)
        log = tmp_path / f"worker-{len(workers)}.log"
        workers.append(Worker(app, folder, log, options, clean_environment(**settings)))
        workers[-1].wait_until_it_answers()
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


# --- What the tests are made of: walkthroughs -------------------------------------------------

START = ["find", "prepare", "start-api", "start"]  # the ids of the cells that start an API
INTERRUPT = """
import os, signal, threading
threading.Timer(0.25, os.killpg, (os.getpgid(0), signal.SIGINT)).start()
"""
PAUSE = "time.sleep(4)"  # longer than any lease in the notebook


def notebook():
    return nbformat.read(str(HERE / "walkthrough.ipynb"), as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output):
    return output.get("text") or output.get("ename") or output["data"]["text/plain"]


def steps_of_walks():
    """The runs of the notebook: ids of cells, and the sources of others put between them."""
    everything = [cell["id"] for cell in code_cells(notebook())]
    crash = everything.index("lost")
    disturbed = everything.copy()
    for step, id_ in [("interrupt", "start"), ("interrupt", "in-a-row")]:
        disturbed.insert(disturbed.index(id_), f"{step} {id_}")
    for id_ in ("survived", "lease"):
        disturbed.insert(disturbed.index(id_), PAUSE)
    return {
        "interrupted, and with pauses": disturbed,
        "with an API": [id_ for id_ in everything[:crash] for _ in range(2)] + ["end"],
        "fails": [*START, "assert False, 'this cell fails'"],
        "with another server": ["find"],
    }


@contextlib.contextmanager
def server_for(name, folder):
    """Yield an address: of a live API, of another server, or of nobody."""
    if name == "with an API":
        environment = clean_environment(REDIS_PORT=free_port(), PREDICTION_LATENCY=0)
        worker = Worker("main:app", folder, folder / "walk.log", [], environment)
        worker.wait_until_it_answers()
        yield worker.url
        worker.kill()
    elif name == "with another server":
        with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
    else:
        yield f"http://127.0.0.1:{free_port()}"


class Walk:
    """A run of the notebook in a kernel of its own, and what came of it."""

    def __init__(self, name, folder):
        run, self.error = notebook(), None
        cells = {cell["id"]: cell for cell in run.cells}
        run.cells = [self.step(cells, step) for step in steps_of_walks()[name]]
        self.cells = {cell["id"]: cell for cell in run.cells}
        client = NotebookClient(run, timeout=60, resources={"metadata": {"path": str(folder)}})
        with server_for(name, folder) as self.url:
            try:
                client.execute(env=clean_environment(API_URL=self.url, PREDICTION_LATENCY=0.1))
            except Exception as error:
                self.error = str(error)
                wait_until(lambda: name == "with another server" or not answers(self.url))
            self.answer = answers(self.url)

    def step(self, cells, step):
        interrupted = step.startswith("interrupt ")
        source = cells[step.split()[-1]].source if interrupted else step
        cell = nbformat.v4.new_code_cell(cells[step].source if step in cells else source)
        cell["id"] = step.replace(" ", "-") if step in cells or interrupted else cell["id"]
        if interrupted:
            cell.source = INTERRUPT + source
            cell.metadata["tags"] = ["raises-exception"]
        return cell

    def output(self, id_):
        return "".join(map(text_of, self.cells[id_].outputs))


@pytest.fixture(scope="session", autouse=True)
def walks(request, folder):
    """The runs of the notebook. Each takes a while, so they go on beside the other tests."""
    names = list(steps_of_walks())
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(names)) as pool:
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # so that the kernel is of this Python
        start = functools.lru_cache(None)(lambda name: pool.submit(Walk, name, folder))
        wanted = any("walk" in item.fixturenames for item in request.session.items)
        if wanted and "PYTEST_XDIST_WORKER" not in os.environ:
            list(map(start, names))
        yield start


@pytest.fixture
def walk(walks):
    return lambda name: walks(name).result(4 * LONG)
