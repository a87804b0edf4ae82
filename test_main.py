"""Tests of all that the API promises, by requests to a live server.

First come the promises that this example is about, as stories; then the other answers of the API,
the edge cases, the settings and the walkthrough; and last the helpers and fixtures. (What the
documents say is checked in .ci/run.)

`api` is the URL of a server in a thread of this process, so that a test can change its settings and
its model. `start_worker` starts another server as a process, which can be killed. A test with
`api` or `store` runs twice, with fakeredis and with a real Redis that the tests start themselves. A
test with `redis_server` needs the real one. Where there is no redis-server program, what needs it
is skipped.
"""

import asyncio
import contextlib
import json
import os
import queue
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fakeredis
import jupyter_client
import pytest
import redis
import requests
import uvicorn

import main

HERE = Path(__file__).parent
JSON = "application/json"
LONG = 20  # seconds; longer than anything should take
NO_REDIS = 1  # a port at which nothing answers

for setting in main.Settings.model_fields:
    os.environ.pop(setting, None)  # those of whoever runs the tests
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # so that the walkthrough's kernel is of this Python

# --- The promises -----------------------------------------------------------------------------


def test_killed_worker_loses_nothing(start_worker, api, store):
    doomed = start_worker(**store.settings, PREDICTION_LATENCY=LONG, PREDICTION_TIMEOUT=1)
    paths = [accept(doomed.url) for _ in range(3)]
    doomed.kill()
    assert [poll(api, path)["status"] for path in paths] == 3 * ["completed"]


def test_prediction_that_kills_its_workers_is_failed(start_worker, api, store, models, caplog):
    path = store.leave_orphan(attempt=2)  # two workers have been killed
    third = start_worker(**store.settings, PREDICTION_LATENCY=LONG)
    assert requests.get(third.url + path).status_code == 202  # this poll starts another attempt
    wait_until(lambda: store.record(path)["attempt"] == 3)
    third.kill()
    store.delete(key_of(path, ":lease"))
    assert poll(api, path)["output"] == {"status": "failed", "input": "orphan", "result": None}
    assert models.empty()  # the model has not run a fourth time
    assert f"{key_of(path)} has used up its attempts" in caplog.messages


def test_first_output_is_final_when_two_attempts_race(api, store, models):
    waiting = ThreadPoolExecutor(1).submit(predict, api)
    slow = models.get(timeout=LONG)
    path = "/predict/" + store.keys("*:lease")[0].split(":")[1]
    store.delete(key_of(path, ":lease"))
    assert requests.get(api + path).status_code == 202  # this poll starts another attempt
    models.get(timeout=LONG).set_result("The second attempt's")
    first = poll(api, path)
    slow.set_result("The first attempt's")
    assert waiting.result(LONG).json() == requests.get(api + path).json() == first
    assert first["output"]["result"] == "The second attempt's"


def test_worker_told_to_stop_finishes_first(start_worker, api, store):
    worker = start_worker(**store.settings, PREDICTION_LATENCY=0.3)
    path = accept(worker.url)
    log = worker.stop()
    assert requests.get(api + path).json()["status"] == "completed"
    assert f" Predictions are kept in Redis at 127.0.0.1:{store.port}.\n" in log


def test_worker_cut_short_hands_its_predictions_back(start_worker, redis_server):
    grace = "--timeout-graceful-shutdown=1"
    hasty = start_worker(grace, **redis_server.settings, PREDICTION_LATENCY=LONG)
    paths = [accept(hasty.url), redis_server.leave_orphan(), accept(hasty.url)]
    assert requests.get(hasty.url + paths[1]).status_code == 202  # this poll starts an attempt
    redis_server.set(key_of(paths[2], ":lease"), "another worker")
    redis_server.client_pause(1400)  # milliseconds; all three are cut short after 1000
    log = hasty.stop()
    assert redis_server.keys("*:lease") == [key_of(paths[2], ":lease")]  # its own are released
    assert log.count("Exception in ASGI application") >= 3  # uvicorn logs what was cancelled
    assert "redis.exceptions" not in log


def test_redis_killed_and_back_loses_nothing(redis_server, api_on, caplog):
    api = api_on(**redis_server.settings, PREDICTION_LATENCY=0.7, PREDICTION_TIMEOUT=1)
    path = accept(api)
    redis_server.process.kill()
    assert_503_within(2, requests.get, api + path)
    assert_503_within(2, predict, api)
    assert requests.get(api).status_code == 200
    wait_until(lambda: "an attempt is lost" in caplog.text)  # its output cannot be stored
    redis_server.start()
    assert poll(api, path)["status"] == "completed"


def test_frozen_redis_is_503_within_5_s(redis_server, api_on):
    api = api_on(**redis_server.settings, PREDICTION_LATENCY=0)
    redis_server.process.send_signal(signal.SIGSTOP)
    at_once(100, assert_503_within, 5, predict, api)
    redis_server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: predict(api).status_code == 200)


def test_failover_is_followed(redis_server, fake_redis, api_on, monkeypatch):
    def connect_to_new(connect=asyncio.open_connection, **options):  # as if REDIS_HOST led there
        return connect(**dict(options, port=fake_redis.port))

    api = api_on(**redis_server.settings, PREDICTION_LATENCY=0)
    path = fake_redis.leave_orphan()  # accepted before the failover, and replicated
    redis_server.replicaof("127.0.0.1", fake_redis.port)  # so the old Redis refuses writes
    monkeypatch.setattr(asyncio, "open_connection", connect_to_new)
    assert_503_within(2, predict, api)
    assert predict(api).status_code == 200
    assert poll(api, path)["status"] == "completed"


def test_burst_is_served_side_by_side_over_few_connections(redis_server, api_on):
    api = api_on(**redis_server.settings, PREDICTION_LATENCY=1)
    redis_server.client_pause(500)  # milliseconds, in which commands pile up
    start = time.monotonic()
    assert {response.status_code for response in at_once(200, predict, api)} == {200}
    assert time.monotonic() - start < 10  # not 200 s
    assert redis_server.info("stats")["total_connections_received"] < 5


def test_without_redis_the_api_says_so_and_does_its_job(start_worker):
    worker = start_worker(REDIS_PORT=NO_REDIS, PREDICTION_LATENCY=0)
    assert poll(worker.url, accept(worker.url))["status"] == "completed"
    log = worker.stop()
    assert log.count("WARNING") == 1
    assert re.search(f"No Redis answers at localhost:{NO_REDIS}, .* Set REDIS_HOST ", log)
    assert "Traceback" not in log


# --- What clients can see ---------------------------------------------------------------------


def test_greeting_and_no_icon(api):
    for path, message in [("/", "Welcome to the Mock Model API!"), ("/favicon.ico", "No favicon")]:
        response = requests.get(api + path)
        assert (response.status_code, response.json()) == (200, {"message": message})


def test_synchronous_prediction_is_completed_and_kept_exactly(api):
    text = "NUL \0 \u2028\r\n\t\"\\' Zoë \U0010ffff ".ljust(10_000, "🚀")
    response = predict(api, text)
    prediction_id, result = response.json()["prediction_id"], response.json()["output"]["result"]
    assert uuid.UUID(prediction_id).version == 4
    assert re.fullmatch("Mock result [0-9a-f]{8}", result)
    output = {"status": "completed", "input": text, "result": result}
    prediction = {"prediction_id": prediction_id, "status": "completed", "output": output}
    assert (response.status_code, response.json()) == (200, prediction)
    assert poll(api, f"/predict/{prediction_id}") == prediction
    assert predict(api, "").json()["output"]["input"] == ""


def test_asynchronous_prediction_is_accepted_then_processing_then_completed(api, store, models):
    accepted = predict(api, async_mode="true")
    prediction_id = accepted.json()["prediction_id"]
    path = f"/predict/{prediction_id}"
    message = "Request received. Processing asynchronously."
    assert accepted.status_code == 202
    assert accepted.json() == {"message": message, "prediction_id": prediction_id}
    assert accepted.headers["Location"] == path
    pending = requests.get(api + path)
    assert (pending.status_code, pending.headers["Retry-After"]) == (202, "1")
    assert pending.json() == {"detail": "Prediction is still processing."}
    assert store.record(path) == {"status": "processing", "input": "Some input data", "attempt": 1}
    assert re.fullmatch("[0-9a-f]{32}", store.get(key_of(path, ":lease")))
    models.get(timeout=LONG).set_result("Done")
    output = {"status": "completed", "input": "Some input data", "result": "Done"}
    done = {"prediction_id": prediction_id, "status": "completed", "output": output}
    assert poll(api, path) == done
    assert json.loads(store.get(key_of(path, ":output"))) == output


@pytest.mark.parametrize("name", ["async_mode", "Async-Mode"])
def test_mode_header(api, name):
    assert predict(api, **{name: "true"}).status_code == 202
    assert predict(api, **{name: "false"}).status_code == 200
    response = predict(api, **{name: "maybe"})
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["detail"]] == [["header", name]]


def test_poll_of_unknown_prediction_is_404(api):  # as one is when its keys have expired
    response = requests.get(f"{api}/predict/{uuid.uuid4()}")
    assert (response.status_code, response.json()) == (404, {"detail": "Prediction not found."})


def test_every_key_expires(api, store):
    main.settings.PREDICTION_TTL, main.settings.PREDICTION_TIMEOUT = 1000, 500
    poll(api, accept(api))
    poll(api, store.leave_orphan())
    lives = sorted(store.pttl(key) / 1000 for key in store.scan_iter())
    assert len(lives) == 6
    assert 500.5 < lives[0] <= lives[1] <= 501  # a lease outlasts its attempt by a second
    assert 990 < lives[2] <= lives[5] <= 1000


def test_poll_of_no_uuid_is_422(api):
    response = requests.get(f"{api}/predict/secret%00%ff")
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["detail"]] == [["path", "prediction_id"]]
    assert "secret" not in response.text


def test_wrong_method_is_405_and_wrong_path_404(api):
    for method, path, status in [("GET", "/predict", 405), ("POST", "/predict/", 404)]:
        response = requests.request(method, api + path)
        assert response.status_code == status
        assert isinstance(response.json()["detail"], str)


BAD_BODIES = {
    "no input": (b"{}", JSON, 422),
    "10,001 characters": (b'{"input": "%s"}' % (b"x" * 10_001), JSON, 422),
    "half a body": (b'{"input": "secret"', JSON, 422),
    "NaN": (b'{"input": NaN}', JSON, 422),
    "a number too large": (b'{"input": 1e999}', JSON, 422),
    "a lone surrogate": (b'{"input": "secret \\ud800"}', JSON, 422),
    "no UTF-8": (b'{"input": "secret \xff"}', JSON, 400),
    "no UTF-8 in another type": (b"secret \xff", "text/plain", 422),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_body_is_4xx_and_not_repeated(api, store, name):
    body, content_type, status = BAD_BODIES[name]
    response = requests.post(f"{api}/predict", body, headers={"Content-Type": content_type})
    assert response.status_code == status
    assert response.json()["detail"]
    assert "secret" not in response.text
    assert len(response.content) < 300
    assert store.keys() == []


@pytest.mark.parametrize(("size", "status"), [(1_000_000, 422), (1_000_001, 413)])
def test_body_over_1_mb_is_413(api, size, status):
    pytest.importorskip("fastapi", "0.164", reason="this FastAPI has no limit for bodies")
    body = b'{"input": "%s"}' % (b"x" * (size - 13))
    for data in (body, iter([body[:600_000], body[600_000:]])):  # the second is sent in chunks
        response = requests.post(f"{api}/predict", data, headers={"Content-Type": JSON})
        assert (len(body), response.status_code) == (size, status)
        assert ("Content Too Large" in response.text) == (status == 413)


# --- Models that misbehave --------------------------------------------------------------------


MISBEHAVING_MODELS = {
    "raises": "async def model(text): raise ValueError(text)",
    "raises no Exception": "async def model(text): raise BaseException(text)",  # as from Rust
    "raises GeneratorExit": "async def model(text): raise GeneratorExit",
    "raises CancelledError": "async def model(text): raise asyncio.CancelledError",
    "cancels itself": "async def model(text): asyncio.current_task().cancel(); return text",
    "raises what cannot be printed": """async def model(text):
        raise SyntaxError(text, ("file", 1, "x", b"not text"))""",
    "exits": "async def model(text): sys.exit(1)",
    "ignores its cancellation": """async def model(text):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.sleep(1)""",
    "is a plain function": "def model(text): return text",
    "is a generator": "async def model(text): yield text",
    "returns nothing": "async def model(text): pass",
    "returns what only looks like text": """async def model(text):
        return type("Text", (), {"encode": print})()""",
    "returns half a character": r"async def model(text): return '\ud800'",
}


@pytest.mark.parametrize("name", MISBEHAVING_MODELS)
def test_prediction_of_a_model_that_misbehaves_is_failed(api, monkeypatch, caplog, name):
    namespace = dict(globals())
    exec(MISBEHAVING_MODELS[name], namespace)
    monkeypatch.setattr(main, "mock_model", namespace["model"])
    main.settings.PREDICTION_TIMEOUT = 0.2
    start = time.monotonic()
    response = predict(api)
    assert (response.status_code, response.json()) == (500, {"detail": "Prediction failed."})
    assert time.monotonic() - start < 0.8
    assert "Traceback" in caplog.text or "printed" in name
    assert "NameError" not in caplog.text  # it misbehaves as it should
    path = accept(api)
    output = {"status": "failed", "input": "Some input data", "result": None}
    done = {"prediction_id": path.split("/")[-1], "status": "failed", "output": output}
    assert poll(api, path) == done
    message = f"{key_of(path)}: the model (took too long|has failed)"
    assert any(re.match(message, logged) for logged in caplog.messages)


def test_result_that_was_there_when_the_worker_froze_counts(api, monkeypatch):
    async def model(text):
        time.sleep(0.4)  # noqa: ASYNC251 - as if the worker were frozen
        for _ in range(9):  # turns of the event loop until the result has come through
            await asyncio.sleep(0)
        return "in time"

    main.settings.PREDICTION_TIMEOUT = 0.2
    monkeypatch.setattr(main, "mock_model", model)
    assert predict(api).json()["output"]["result"] == "in time"


def test_prediction_of_a_model_that_hangs_is_failed_and_the_model_cancelled(api, models):
    main.settings.PREDICTION_TIMEOUT = 0.2
    assert poll(api, accept(api))["status"] == "failed"
    wait_until(models.get(timeout=LONG).cancelled)


# --- Leases and attempts ----------------------------------------------------------------------


def test_orphan_is_taken_over_by_one_poll_of_many(api, store, models):
    main.settings.PREDICTION_ATTEMPTS = 2  # so this is the last
    path = store.leave_orphan()
    assert {response.status_code for response in at_once(20, requests.get, api + path)} == {202}
    model = models.get(timeout=LONG)
    assert late_poll(path) == []
    model.set_result("Done")
    assert poll(api, path)["output"]["result"] == "Done"
    wait_for_attempts()
    assert (model.input, models.empty()) == ("orphan", True)
    assert store.record(path) == {"status": "processing", "input": "orphan", "attempt": 2}


def test_orphan_that_is_finished_or_gone_by_now_is_left_alone(api, store):
    finished, gone = store.leave_orphan(), "/predict/gone"
    store.set(key_of(finished, ":output"), "{}")
    assert late_poll(finished) == late_poll(gone) == []


def test_output_counts_if_the_first_one_expires_meanwhile():
    class Forgetful:
        async def nothing(self, *args, **options):
            return None

        set = get = nothing

    output = asyncio.run(main.store_output(Forgetful(), "key", "text", "result"))
    assert (output.status, output.result) == ("completed", "result")


def test_one_round_trip_before_an_answer(redis_server, api_on, models):
    api = api_on(**redis_server.settings)
    redis_server.config_resetstat()
    path = accept(api)
    assert requests.get(api + path).status_code == 202
    models.get(timeout=LONG).set_result("Done")
    wait_for_attempts()
    assert requests.get(api + path).status_code == 200
    reads = redis_server.info("stats")["total_reads_processed"]
    assert reads == 5  # to accept, poll, store and poll, and this one
    assert "cmdstat_multi" not in redis_server.info("commandstats")


# --- Redis that misbehaves --------------------------------------------------------------------


def test_redis_that_is_full_is_503_until_there_is_room(redis_server, api_on):
    api = api_on(**redis_server.settings, PREDICTION_LATENCY=0)
    redis_server.config_set("maxmemory", 1)
    assert_503_within(2, predict, api)
    redis_server.config_set("maxmemory", 0)
    assert predict(api).status_code == 200


def test_api_that_starts_before_its_redis_recovers(redis_server, api_on, caplog):
    redis_server.process.kill()
    api = api_on(**redis_server.settings, PREDICTION_LATENCY=0)
    assert caplog.messages[-1].startswith(f"Redis at 127.0.0.1:{redis_server.port} is unavailable")
    assert_503_within(2, predict, api)
    assert caplog.messages[-1].startswith("Redis is unavailable: ConnectionError: ")
    redis_server.start()
    assert predict(api).status_code == 200
    redis_server.process.kill()
    redis_server.start()
    assert predict(api).status_code == 200  # nobody has noticed


def test_redis_that_does_not_accept_connections_is_503_within_2_s(api_on):
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for client in (first, second):  # they fill its queue, so that the next gets no answer
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        api = api_on(REDIS_HOST="127.0.0.1", REDIS_PORT=listener.getsockname()[1])
        at_once(50, assert_503_within, 2, predict, api)


def test_redis_with_tls_and_a_user(redis_server, api_on, certificate, monkeypatch, caplog):
    async def take_and_release():
        async with main.new_lease(main.app.state.redis, "prediction:new"):
            pass

    tls_port = free_port()
    tls = f"--tls-port {tls_port} --tls-auth-clients no --tls-cert-file".split()
    redis_server.process.kill()
    redis_server.start(*tls, certificate, "--tls-key-file", certificate)
    rules = "~prediction:* +ping +get +mget +set +del +evalsha +script|load"  # as in README.md
    redis_server.execute_command("ACL SETUSER", "api", "on", ">swordfish", *rules.split())
    right = {"REDIS_HOST": "localhost", "REDIS_PORT": tls_port, "REDIS_TLS": True}
    right.update(REDIS_USERNAME="api", REDIS_PASSWORD="swordfish")
    assert_503_within(2, predict, api_on(**right))  # nobody trusts that certificate yet
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    # 127.0.0.1 is not what the certificate is for.
    wrong = {"REDIS_HOST": "127.0.0.1", "REDIS_PASSWORD": "sardine", "REDIS_USERNAME": ""}
    for name, value in wrong.items():
        assert_503_within(2, predict, api_on(**dict(right, **{name: value})))
    assert "swordfish" not in caplog.text
    caplog.clear()
    api = api_on(**right, PREDICTION_LATENCY=0)
    assert poll(api, accept(api))["status"] == "completed"
    on_server(take_and_release())
    assert caplog.messages == []


def test_redis_is_found_without_redis_host_and_no_connection_is_left_open(redis_server, api_on):
    api_on(REDIS_PORT=redis_server.port)
    wait_until(lambda: len(redis_server.client_list()) == 2)  # the API and this test
    on_server(main.app.state.redis.aclose())
    wait_until(lambda: len(redis_server.client_list()) == 1)


def test_no_reply_is_mixed_up_among_errors_and_cancellations(redis_server, api_on):
    async def send_many():
        client = main.app.state.redis
        first = asyncio.ensure_future(client.ping())
        await asyncio.sleep(0)  # now there is a task to send it, which has not begun
        client.sending.cancel()  # so it is left for the next
        await asyncio.sleep(0.1)  # until that is under way, and the others wait for it
        commands = [client.echo(f"{n}") if n % 100 else client.incr("text") for n in range(2_000)]
        tasks = [asyncio.ensure_future(command) for command in commands]
        await asyncio.sleep(0.1)
        for task in [client.sending, *tasks[50::100]]:  # as asyncio does if Ctrl+C is pressed twice
            task.cancel()
        return await asyncio.gather(first, *tasks, return_exceptions=True)

    api_on(**redis_server.settings)
    redis_server.set("text", "not a number")
    redis_server.client_pause(1000)
    first, *replies = on_server(send_many())
    assert (type(first), str(first)) == (redis.RedisError, "CancelledError: ")
    assert {type(reply) for reply in replies[::100]} == {redis.ResponseError}
    assert {type(reply) for reply in replies[50::100]} == {asyncio.CancelledError}
    assert replies[1::2] == [b"%d" % number for number in range(1, 2_000, 2)]
    on_server(main.app.state.redis.ping())  # over a new connection, since there were errors
    assert redis_server.info("stats")["total_connections_received"] == 4  # one of them is ours
    with pytest.raises(redis.RedisError, match="Unicode"):  # raised before anything is sent
        on_server(main.app.state.redis.echo("\ud800"))


# --- Settings ---------------------------------------------------------------------------------


def test_env_file_is_read_and_its_unknown_keys_are_ignored(tmp_path, monkeypatch):
    text = "REDIS_USERNAME=Zoë\nREDIS_HOST=there\nREDIS_PASSWORD=swordfish\nSOMETHING=else\n"
    (tmp_path / ".env").write_text(text, encoding="utf-8-sig")  # with a byte order mark
    shutil.copy(str(HERE / "main.py"), str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)  # it is found beside main.py, not where one happens to be
    monkeypatch.setenv("REDIS_HOST", "here")
    settings = runpy.run_path(str(tmp_path / "main.py"))["settings"]
    assert (settings.REDIS_USERNAME, settings.REDIS_HOST) == ("Zoë", "here")
    assert "swordfish" not in str(settings)
    assert (settings.REDIS_PORT, settings.PREDICTION_ATTEMPTS) == (6379, 3)
    assert (settings.PREDICTION_LATENCY, settings.PREDICTION_TIMEOUT) == (2, 10)
    assert settings.PREDICTION_TTL == 24 * 60 * 60


BAD_SETTINGS = """
    REDIS_HOST= REDIS_PORT=0 REDIS_PORT=65536 REDIS_TLS=perhaps
    PREDICTION_LATENCY=-1 PREDICTION_LATENCY=inf PREDICTION_TIMEOUT=0 PREDICTION_TIMEOUT=inf
    PREDICTION_ATTEMPTS=0 PREDICTION_ATTEMPTS=1.5 PREDICTION_TTL=0 PREDICTION_TTL=9999999999
"""


@pytest.mark.parametrize("setting", BAD_SETTINGS.split())
def test_bad_setting_stops_the_start_and_is_named(monkeypatch, setting):
    name, value = setting.split("=")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        runpy.run_path(str(HERE / "main.py"))


def test_lowest_settings_are_accepted():
    lowest = {"REDIS_HOST": "h", "REDIS_PORT": 1, "PREDICTION_LATENCY": 0}
    lowest.update(PREDICTION_TIMEOUT=0.001, PREDICTION_ATTEMPTS=1, PREDICTION_TTL=1)
    main.Settings(_env_file=None, **lowest)


# --- The walkthrough --------------------------------------------------------------------------


def test_walkthrough_survives_interruptions_and_stops_what_it_has_started(walk):
    replies = iter(lambda: walk.get_shell_msg(timeout=6 * LONG)["content"], None)
    reply = next(reply for reply in replies if "execution_count" in reply)
    assert reply["status"] == "ok", reply
    walk.shutdown()
    with pytest.raises(requests.ConnectionError):
        wait_until(lambda: not requests.get(WALK_URL, timeout=LONG))  # so nothing answers at last


def test_walkthrough_does_not_stop_what_it_has_found(api, monkeypatch):
    monkeypatch.setenv("API_URL", api)
    monkeypatch.chdir(HERE)
    namespace = {}
    for id_ in ("find", "prepare", "start-api", "start", "end"):
        run_cell(id_, namespace)
    namespace["folder"].cleanup()
    assert namespace["started"] == {}
    assert requests.get(api).status_code == 200


def test_walkthrough_says_what_is_at_the_address_instead(server, api_on, monkeypatch):
    monkeypatch.setenv("API_URL", f"{server}/docs")
    with pytest.raises(AssertionError, match="Stop the other server"):
        run_cell("find", {})
    monkeypatch.setenv("API_URL", api_on(REDIS_HOST="127.0.0.1", REDIS_PORT=NO_REDIS))
    with pytest.raises(AssertionError, match="Start Redis"):
        run_cell("find", {})


# --- What the tests are made of: verbs --------------------------------------------------------


def predict(api, text="Some input data", **headers):
    return requests.post(f"{api}/predict", json={"input": text}, headers=headers, timeout=LONG)


def accept(api):
    """Have a prediction accepted, to be made in the background; return its path."""
    response = predict(api, async_mode="true")
    assert response.status_code == 202
    return response.headers["Location"]


def poll(api, path):
    """Return the prediction once it is ready."""
    wait_until(lambda: requests.get(api + path, timeout=LONG).status_code != 202)
    response = requests.get(api + path, timeout=LONG)
    assert response.status_code == 200
    return response.json()


def wait_until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, f"not within {LONG} s"
        time.sleep(0.02)


def at_once(number, function, *args):
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda _: function(*args), range(number)))


def assert_503_within(seconds, request, *args):
    start = time.monotonic()
    response = request(*args)
    assert time.monotonic() - start < seconds
    assert (response.status_code, response.json()) == (503, {"detail": "Redis is unavailable."})
    assert response.headers["Retry-After"] == "1"


def key_of(path, suffix=""):
    return path.replace("/predict/", "prediction:") + suffix


def late_poll(path):
    """Go on from where a poll has seen no lease; return the background tasks that it would add."""
    tasks = main.BackgroundTasks()
    on_server(main.add_next_attempt(main.app.state.redis, key_of(path), tasks))
    return tasks.tasks


def free_port():
    """Return a port below those that the system gives to clients, so that it stays free."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


# --- What the tests are made of: processes, stores, models ------------------------------------


class Process(subprocess.Popen):
    """A program that logs to a file, and has started when it has logged that it is ready."""

    def __init__(self, command, ready, folder, **settings):
        self.log = folder / f"{uuid.uuid4()}.log"
        env = dict(os.environ, **settings)
        with self.log.open("w") as log:
            super().__init__(command, cwd=str(folder), env=env, stdout=log, stderr=log)
        wait_until(lambda: ready in self.log.read_text() or self.poll() is not None)
        assert self.poll() is None, self.log.read_text()

    def kill(self):
        super().kill()
        self.wait()

    def stop(self):
        """Tell it to stop, wait until it has, and return its log."""
        self.terminate()
        assert self.wait(LONG) in (0, -signal.SIGTERM)
        return self.log.read_text()


class Store(redis.Redis):
    """A client of a Redis, or of what is said to be one, with words for what the tests do to it."""

    def __init__(self, port):
        super().__init__(port=port, decode_responses=True)
        self.port, self.settings = port, {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": port}

    def record(self, path):
        return json.loads(self.get(key_of(path)))

    def leave_orphan(self, attempt=1):
        """Leave what a killed worker leaves, after its lease has run out; return the path."""
        path = f"/predict/{uuid.uuid4()}"
        record = {"status": "processing", "input": "orphan", "attempt": attempt}
        self.set(key_of(path), json.dumps(record), ex=100)
        return path


@pytest.fixture
def redis_server(tmp_path):
    """A real Redis of its own, empty, which the test may kill and start again."""

    def start(*options):
        # No fsync, since the default may put off a write that a kill then loses.
        command = f"redis-server --port {store.port} --appendonly yes --appendfsync no".split()
        store.process = Process([*command, *options], "Ready to accept", tmp_path)

    if not shutil.which("redis-server"):
        pytest.skip("no redis-server program on this machine")
    with Store(free_port()) as store:
        store.start = start
        store.start()
        yield store
        store.process.kill()


@pytest.fixture
def fake_redis(monkeypatch):
    """A fakeredis, empty, which the API in the thread embeds, and others connect to."""
    with fakeredis.TcpFakeServer(("127.0.0.1", 0)) as server:
        server.daemon_threads = True  # its threads do not all notice that a client is gone
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        embedded = partial(main.FakeAsyncRedis, server=server.fake_server)
        monkeypatch.setattr(main, "FakeAsyncRedis", embedded)
        yield Store(server.server_address[1])
        server.shutdown()


@pytest.fixture(params=["fake_redis", "redis_server"])
def store(request):
    """An empty store that outlives its workers."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def certificate(tmp_path):
    """A file with a certificate for localhost, which is its own authority, and with its key."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl program on this machine")
    path = str(tmp_path / "certificate.pem")
    options = "-x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    command = ["openssl", "req", *options.split(), "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", path, "-out", path], check=True, stderr=subprocess.DEVNULL)
    return path


SERVER = uvicorn.Server(  # api_on() does what the lifespan would do
    uvicorn.Config(main.app, port=0, lifespan="off", ws="none", log_config=None, access_log=False)
)


def wait_for_attempts():
    """Wait for all requests to the server in the thread and for their background tasks."""
    wait_until(lambda: not SERVER.server_state.tasks)


def on_server(coroutine):
    """Run a coroutine in the event loop of the server; return what it returns."""
    loop = SERVER.servers[0].get_loop()
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(LONG)


@pytest.fixture(scope="session")
def server():
    """The URL of the API that runs in a thread until all tests are done."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, SERVER.serve())
        wait_until(lambda: SERVER.started)
        yield f"http://127.0.0.1:{SERVER.servers[0].sockets[0].getsockname()[1]}"
        SERVER.should_exit = SERVER.force_exit = True  # also if attempts never end


@pytest.fixture
def api_on(server, monkeypatch):
    """Let the API connect to Redis: api_on(A_SETTING=its_value) returns the URL of the API."""

    def on(**settings):
        monkeypatch.setattr(main, "settings", main.Settings(_env_file=None, **settings))
        main.app.state.redis = on_server(main.connect())
        return server

    yield on
    wait_for_attempts()
    on_server(main.app.state.redis.aclose())


@pytest.fixture
def api(store, api_on):
    """The URL of a live API on the store; a test can change main.settings and the model."""
    # It embeds the fakeredis if nothing answers at its address.
    settings = store.settings if hasattr(store, "process") else {"REDIS_PORT": NO_REDIS}
    return api_on(**settings, PREDICTION_LATENCY=0.05)


@pytest.fixture
def models(monkeypatch):
    """A queue of the results that models are at work on, until a test sets them."""

    async def model(text):
        result = Future()
        result.input = text
        models.put(result)
        return await asyncio.wrap_future(result)

    models = queue.Queue()
    monkeypatch.setattr(main, "mock_model", model)
    return models


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a copy of main.py, and without the .env that may be beside the original."""
    folder = tmp_path_factory.mktemp("app")
    shutil.copy(str(HERE / "main.py"), str(folder))
    return folder


@pytest.fixture
def start_worker(folder, request):
    """Start an API process: start_worker("--an-option-of-uvicorn", A_SETTING=its_value)."""

    def start(*options, **settings):
        command = [sys.executable, "-m", "uvicorn", "main:app", "--port=0", *options]
        settings = {name: str(value) for name, value in settings.items()}
        worker = Process(command, "Uvicorn running on", folder, **settings)
        worker.url = re.findall("http://[0-9.:]+", worker.log.read_text())[-1]
        request.addfinalizer(worker.kill)
        return worker

    return start


# --- What the tests are made of: the walkthrough ----------------------------------------------

NOTEBOOK = json.loads((HERE / "walkthrough.ipynb").read_text(encoding="utf-8"))
CELLS = {c["id"]: "".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"}
WALK = r"""
import os, pytest, re, requests, signal, threading, time
from IPython import get_ipython
from IPython.utils.capture import capture_output

def run(id_):
    get_ipython().run_cell(CELLS[id_]).raise_error()

with capture_output() as shown:
    for id_ in CELLS:
        if id_ in ("start", "race"):
            threading.Timer(0.25, os.killpg, (os.getpgid(0), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                run(id_)
        if id_ == "lease":
            time.sleep(2)  # longer than the second lease has left
        if id_ == "end":
            run("prepare")  # again, which does not make it forget what to stop
        run(id_)
assert re.search("attempt.*lease.* 202\n.* 200\n.*2nd worker", shown.stdout, re.DOTALL)
with pytest.raises(requests.ConnectionError):  # the walkthrough has stopped what it had started
    requests.get(os.environ["API_URL"])
run("end")  # again, when there is nothing left to stop
for id_ in list(CELLS)[1:]:  # and forgotten it, so a cell says what to run first
    if "assert " in CELLS[id_]:
        with pytest.raises(AssertionError, match="Run the cells above"):
            run(id_)
for id_ in 2 * list(CELLS)[: list(CELLS).index("lost")]:
    run(id_)
requests.get(os.environ["API_URL"])
"""
WALK_URL = f"http://127.0.0.1:{free_port()}"


def run_cell(id_, namespace):
    """Run what of a cell is Python, without the commands of IPython."""
    exec(re.sub("(?m)^%.*", "", CELLS[id_]), namespace)


@pytest.fixture(scope="session")
def walk(folder):
    """A kernel in which a difficult reader takes the walkthrough; it replies when that is done."""
    settings = dict(os.environ, API_URL=WALK_URL, PREDICTION_LATENCY="0.1")
    with jupyter_client.run_kernel(cwd=str(folder), env=settings) as kernel:
        kernel.execute(f"exec({WALK!r}, {{'CELLS': {CELLS!r}}})")  # in names of its own
        yield kernel


@pytest.fixture(scope="session", autouse=True)
def early_walk(request):
    """Let the walk go on beside the tests, since it takes a while (unless they are spread)."""
    wanted = any("walk" in item.fixturenames for item in request.session.items)
    if wanted and "PYTEST_XDIST_WORKER" not in os.environ:
        request.getfixturevalue("walk")
