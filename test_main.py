"""Every promise of the API, kept to a client that talks HTTP to a live server.

Most tests run the server in a thread, where a test can change settings and the model. Those that
kill it, or that look at its environment, run it as a process. Both run on fakeredis and on a real
Redis, which the tests start themselves; without a redis-server program those tests are skipped.
"""

import asyncio
import contextlib
import json
import os
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fakeredis
import nbformat
import pytest
import redis
import redis.asyncio
import requests
import uvicorn
from nbclient import NotebookClient

import main

HERE = Path(__file__).parent
JSON = "application/json"
PROCESSING = {"detail": "Prediction is still processing."}
UNAVAILABLE = {"detail": "Redis is unavailable."}
LONG = 20  # seconds that no wait in these tests should ever take

BAD_BODIES = {
    "nothing": (b"", JSON),
    "null": (b"null", JSON),
    "a list": (b"[]", JSON),
    "no input": (b"{}", JSON),
    "a null input": (b'{"input": null}', JSON),
    "a number": (b'{"input": 1}', JSON),
    "10,001 characters": (b'{"input": "%s"}' % (b"x" * 10_001), JSON),
    "half a body": (b'{"input": "secret"', JSON),
    "another type": (b'{"input": "secret"}', "text/plain"),
    "a form": (b"input=secret", "application/x-www-form-urlencoded"),
    "a type that is no type": (b'{"input": "secret"}', "\xff/\xfe"),
    "NaN": (b'{"input": NaN}', JSON),
    "Infinity": (b'{"input": -Infinity}', JSON),
    "a number too large": (b'{"input": 1e999}', JSON),
    "6,000 digits": (b'{"input": %s}' % (b"7" * 6_000), JSON),
    "a lone surrogate": (b'{"input": "secret \\ud800"}', JSON),
    "a lone surrogate in a list": (b'{"input": ["secret \\ud800"]}', JSON),
    "a lone surrogate as a key": (b'{"secret \\ud800": "secret"}', JSON),
    "a lone surrogate in UTF-8": (b'{"input": "secret \xed\xa0\x80"}', JSON),
    "no UTF-8": (b'{"input": "secret \xff"}', JSON),
    "no UTF-8 in another type": (b"secret \xff", "text/plain"),
    "no UTF-8 in no type": (b"secret \xff", ""),
    "100,000 brackets": (b"[" * 100_000, JSON),
    "100,000 brackets as input": (b'{"input": %s%s}' % (b"[" * 100_000, b"]" * 100_000), JSON),
    "5 MB": (b'{"input": "%s"}' % (b"x" * 5_000_000), JSON),
    "5 MB of another type": (b"x" * 5_000_000, "text/plain"),
}
GOOD_INPUTS = ["", "a\0b", "\u2028\r\n\t\"\\'", "Zoë 🚀 \U0010ffff", "x" * 10_000, "🚀" * 10_000]


# --- What the tests are made of ---------------------------------------------------------------


def wait_until(condition, seconds=LONG):
    """Return the first true value of condition(), or fail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {condition}")


def clean_environment(**settings):
    """Return this environment, with these settings and no others."""
    names = main.Settings.model_fields
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return dict(clean, **{name: str(value) for name, value in settings.items()})


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(url):
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(url, timeout=LONG)


def poll(url):
    """Return the first answer that is not 202."""

    def final():
        response = requests.get(url, timeout=LONG)
        return response if response.status_code != 202 else None

    return wait_until(final)


def predict(api, text="Some input data", **headers):
    return requests.post(f"{api}/predict", json={"input": text}, headers=headers, timeout=LONG)


def accept(api, text="Some input data"):
    """Have a prediction accepted; return its address."""
    response = predict(api, text, async_mode="true")
    assert response.status_code == 202
    return api + response.headers["Location"]


def start_redis(folder, port):
    """Start a real Redis that keeps what it holds in folder; return its process."""
    folder.mkdir(exist_ok=True)
    options = ["--port", port, "--dir", folder, "--save", "", "--appendonly", "yes"]
    process = subprocess.Popen(
        ["redis-server", *map(str, options)], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    client = redis.Redis(port=port)

    def ready():
        with contextlib.suppress(redis.ConnectionError):
            return client.ping()

    wait_until(ready)
    client.close()
    return process


def at(port):
    return {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": port}


def stop(process):
    process.send_signal(signal.SIGCONT)  # in case the test has frozen it
    process.kill()
    process.wait()


real = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="no redis-server program on this machine"
)


@pytest.fixture
def redis_server(tmp_path):
    """The port of a real Redis, and a list whose last item is its process."""
    port = free_port()
    processes = [start_redis(tmp_path / "redis", port)]
    yield port, processes
    stop(processes[-1])


@pytest.fixture(scope="session")
def server():
    """The URL and the event loop of an API that runs in a thread until all tests are done."""
    options = {"port": 0, "ws": "none", "log_config": None, "access_log": False}
    server = uvicorn.Server(uvicorn.Config(main.app, **options))
    loops = []

    async def serve():
        loops.append(asyncio.get_event_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "settings", main.Settings(_env_file=None, REDIS_PORT=free_port()))
        thread.start()
        wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", loops[0]
    server.should_exit = True
    thread.join(LONG)
    assert not thread.is_alive()


@contextlib.contextmanager
def served(server, monkeypatch, **settings):
    """Serve, at the URL that this yields, with these settings and the store that they name."""
    url, loop = server
    for name in main.Settings.model_fields:
        monkeypatch.delenv(name, raising=False)
    settings = main.Settings(_env_file=None, **settings)
    monkeypatch.setattr(main, "settings", settings)
    monkeypatch.setattr(main, "running", set())

    async def connect():
        return main.Batcher(await main.connect())

    async def get_redis():
        return batcher

    batcher = asyncio.run_coroutine_threadsafe(connect(), loop).result(LONG)
    monkeypatch.setitem(main.app.dependency_overrides, main.get_redis, get_redis)
    yield url
    wait_until(lambda: not main.running)
    asyncio.run_coroutine_threadsafe(batcher.client.aclose(), loop).result(LONG)


@pytest.fixture(params=["fakeredis", pytest.param("redis-server", marks=real)])
def backend(request, monkeypatch):
    """A client of an empty store, and the settings with which the API uses the same one."""
    if request.param == "fakeredis":  # REDIS_HOST is not set and nothing answers at REDIS_PORT
        server = fakeredis.FakeServer()
        monkeypatch.setattr(main, "FakeAsyncRedis", partial(main.FakeAsyncRedis, server=server))
        client, settings = fakeredis.FakeRedis(server=server), {"REDIS_PORT": free_port()}
    else:
        settings = at(request.getfixturevalue("redis_server")[0])
        client = redis.Redis(port=settings["REDIS_PORT"])
    yield client, settings
    client.close()


@pytest.fixture
def store(backend):
    return backend[0]


@pytest.fixture
def api(server, backend, monkeypatch):
    """The URL of a live API on that store; a test can change main.settings and the model."""
    with served(server, monkeypatch, PREDICTION_LATENCY=0.05, **backend[1]) as url:
        yield url


class Worker:
    """An API process of its own, which can be killed."""

    def __init__(self, folder, log, options, settings):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port), *options],
                cwd=str(folder),
                env=clean_environment(**settings),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def started(self):
        wait_until(lambda: answers(self.url) or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def logged(self):
        return self.log.read_text()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a copy of main.py, and without the .env that may be beside the original."""
    folder = tmp_path_factory.mktemp("app")
    shutil.copy(str(HERE / "main.py"), str(folder))
    return folder


@pytest.fixture
def start_worker(folder, tmp_path):
    """Start an API process: start_worker("--an-option-of-uvicorn", A_SETTING="its value")."""
    workers = []

    def start(*options, **settings):
        log = tmp_path / f"worker-{len(workers)}.log"
        workers.append(Worker(folder, log, options, settings))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.wait()


@pytest.fixture(params=["fakeredis", pytest.param("redis-server", marks=real)])
def redis_port(request):
    """The port of a store that outlives the API processes that use it."""
    if request.param == "redis-server":
        yield request.getfixturevalue("redis_server")[0]
        return
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0))
    server.daemon_threads = True  # its threads do not all notice that a client is gone
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


# --- The contract -----------------------------------------------------------------------------


def test_root_says_welcome(api):
    response = requests.get(api)
    assert response.status_code == 200
    assert response.json() == {"message": "Welcome to the Mock Model API!"}


def test_there_is_no_favicon(api):
    response = requests.get(f"{api}/favicon.ico")
    assert response.status_code == 200
    assert response.json() == {"message": "No favicon"}


def test_synchronous_prediction_is_completed_and_kept(api, store):
    response = predict(api)
    assert response.status_code == 200
    prediction = response.json()
    prediction_id, result = prediction["prediction_id"], prediction["output"]["result"]
    assert uuid.UUID(prediction_id).version == 4
    output = {"status": "completed", "input": "Some input data", "result": result}
    assert prediction == {"prediction_id": prediction_id, "status": "completed", "output": output}
    assert isinstance(result, str)
    key = f"prediction:{prediction_id}"
    assert json.loads(store.get(key)) == {"status": "processing", "input": "Some input data"}
    assert json.loads(store.get(f"{key}:output")) == output
    later = requests.get(f"{api}/predict/{prediction_id}")
    assert (later.status_code, later.json()) == (200, prediction)


def test_asynchronous_prediction_is_accepted_then_processing_then_completed(api, store):
    main.settings.PREDICTION_LATENCY = 0.5
    accepted = predict(api, async_mode="true")
    assert accepted.status_code == 202
    prediction_id = accepted.json()["prediction_id"]
    assert accepted.json() == {
        "message": "Request received. Processing asynchronously.",
        "prediction_id": prediction_id,
    }
    assert accepted.headers["Location"] == f"/predict/{prediction_id}"
    url = f"{api}/predict/{prediction_id}"
    pending = requests.get(url)
    assert (pending.status_code, pending.json()) == (202, PROCESSING)
    assert pending.headers["Retry-After"] == "1"
    key = f"prediction:{prediction_id}"
    assert json.loads(store.get(key)) == {"status": "processing", "input": "Some input data"}
    assert store.get(f"{key}:lease").decode() == f"{socket.gethostname()}:{os.getpid()}"
    assert store.get(f"{key}:output") is None
    done = poll(url)
    assert done.status_code == 200
    assert done.json() == {
        "prediction_id": prediction_id,
        "status": "completed",
        "output": json.loads(store.get(f"{key}:output")),
    }
    assert requests.get(url).json() == done.json()


def test_no_two_predictions_are_the_same(api):
    predictions = [predict(api).json() for _ in range(2)]
    assert predictions[0]["prediction_id"] != predictions[1]["prediction_id"]
    assert predictions[0]["output"]["result"] != predictions[1]["output"]["result"]


@pytest.mark.parametrize("name", ["async_mode", "Async-Mode", "ASYNC_MODE"])
@pytest.mark.parametrize(
    ("value", "status"), [("true", 202), ("false", 200), ("maybe", 422), ("", 422)]
)
def test_mode_header(api, name, value, status):
    response = predict(api, **{name: value})
    assert response.status_code == status
    if status == 202:
        assert poll(api + response.headers["Location"]).status_code == 200
    if status == 422:
        [error] = response.json()["detail"]
        assert error["loc"] == ["header", "async_mode" if "_" in name else "Async-Mode"]


@pytest.mark.parametrize("text", GOOD_INPUTS, ids=lambda text: f"{text[:3]!a}-{len(text)}")
def test_input_is_kept_exactly(api, text):
    prediction = predict(api, text).json()
    assert prediction["output"]["input"] == text
    assert poll(accept(api, text)).json()["output"]["input"] == text


def test_poll_of_unknown_id_is_404(api):
    response = requests.get(f"{api}/predict/{uuid.uuid4()}")
    assert response.status_code == 404
    assert response.json() == {"detail": "Prediction not found."}


def test_poll_of_expired_prediction_is_404(api):
    main.settings.PREDICTION_TTL = 1
    url = f"{api}/predict/{predict(api).json()['prediction_id']}"
    assert requests.get(url).status_code == 200
    wait_until(lambda: requests.get(url).status_code == 404)


def test_every_key_expires(api, store):
    main.settings.PREDICTION_TTL, main.settings.PREDICTION_TIMEOUT = 1000, 50
    poll(accept(api))
    lives = sorted(store.pttl(key) / 1000 for key in store.scan_iter())
    assert len(lives) == 3
    assert 50 < lives[0] <= 51  # the lease outlasts the attempt
    assert 990 < lives[1] <= lives[2] <= 1000


def test_id_is_found_in_any_notation(api):
    prediction = predict(api).json()
    plain = uuid.UUID(prediction["prediction_id"]).hex.upper()
    assert requests.get(f"{api}/predict/{plain}").json() == prediction


@pytest.mark.parametrize("name", ["secret", "1", "%00", "%ff", "%ed%a0%80", "x" * 5_000])
def test_poll_of_no_uuid_is_422(api, name):
    response = requests.get(f"{api}/predict/{name}")
    assert response.status_code == 422
    [error] = response.json()["detail"]
    assert error["loc"] == ["path", "prediction_id"]
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("DELETE", f"/predict/{uuid.uuid4()}", 405),
        ("PUT", "/", 405),
        ("POST", "/predict/", 404),
        ("GET", "/predict/", 404),
        ("GET", "/predict/a/b", 404),
        ("GET", "/nowhere", 404),
    ],
)
def test_wrong_method_or_path(api, method, path, status):
    response = requests.request(method, api + path)
    assert response.status_code == status
    assert isinstance(response.json()["detail"], str)


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_body_is_4xx_and_not_repeated(api, store, name):
    body, content_type = BAD_BODIES[name]
    for mode in ("false", "true"):
        for chunked in (False, True):
            headers = {"Content-Type": content_type.encode("latin-1"), "async_mode": mode}
            response = requests.post(
                f"{api}/predict", data=in_chunks(body) if chunked else body, headers=headers
            )
            assert response.status_code in (400, 413, 422)
            if response.status_code != 413:
                assert response.json()["detail"]
            assert "secret" not in response.text
            assert len(response.content) < 300
            assert store.keys() == []


def in_chunks(body):
    return (body[start : start + 65_536] for start in range(0, len(body), 65_536))


def limits_bodies():
    return "max_body_size" in main.FastAPI.__init__.__annotations__


@pytest.mark.skipif(not limits_bodies(), reason="this FastAPI has no limit for bodies")
def test_body_over_1_mb_is_413(api):
    for size, status in ((1_000_000, 422), (1_000_001, 413)):
        body = b'{"input": "%s"}' % (b"x" * (size - 13))
        response = requests.post(f"{api}/predict", data=body, headers={"Content-Type": JSON})
        assert (len(body), response.status_code) == (size, status)


def test_openapi_declares_every_status_with_its_model(api):
    paths = requests.get(f"{api}/openapi.json").json()["paths"]
    declared = {
        f"{method} {path}": {
            status: response["content"][JSON]["schema"]["$ref"].rsplit("/", 1)[1]
            for status, response in operation["responses"].items()
        }
        for path, operations in paths.items()
        for method, operation in operations.items()
    }
    invalid = {"422": "HTTPValidationError"}
    assert declared == {
        "get /": {"200": "Message"},
        "get /favicon.ico": {"200": "Message"},
        "post /predict": {
            "200": "Prediction",
            "202": "Accepted",
            **dict.fromkeys(("400", "413", "500", "503"), "Detail"),
            **invalid,
        },
        "get /predict/{prediction_id}": {
            "200": "Prediction",
            **dict.fromkeys(("202", "404", "503"), "Detail"),
            **invalid,
        },
    }
    [header] = paths["/predict"]["post"]["parameters"]
    assert (header["in"], header["name"], header["schema"]["type"]) == (
        "header",
        "async_mode",
        "boolean",
    )


def test_example_in_openapi_works(api):
    schemas = requests.get(f"{api}/openapi.json").json()["components"]["schemas"]
    [example] = schemas["PredictionRequest"]["properties"]["input"]["examples"]
    assert predict(api, example).status_code == 200
    assert requests.get(f"{api}/docs").status_code == 200


# --- A model that fails -----------------------------------------------------------------------


async def raises(text):
    raise ValueError(f"secret {text}")


async def hangs(text):
    await asyncio.Event().wait()


async def ignores_its_cancellation(text):
    end = time.monotonic() + 1
    while time.monotonic() < end:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)


async def raises_cancelled_error(text):
    raise asyncio.CancelledError


async def returns_no_text(text):
    return object()


async def returns_a_lone_surrogate(text):
    return "\ud800"


FAILING_MODELS = [
    raises,
    hangs,
    ignores_its_cancellation,
    raises_cancelled_error,
    returns_no_text,
    returns_a_lone_surrogate,
]


@pytest.mark.parametrize("model", FAILING_MODELS)
def test_model_that_fails(api, store, monkeypatch, caplog, model):
    main.settings.PREDICTION_TIMEOUT = 0.2
    monkeypatch.setattr(main, "mock_model", model)
    response = predict(api)
    assert (response.status_code, response.json()) == (500, {"detail": "Prediction failed."})
    done = poll(accept(api))
    output = {"status": "failed", "input": "Some input data", "result": None}
    prediction_id = done.json()["prediction_id"]
    assert done.status_code == 200
    assert done.json() == {"prediction_id": prediction_id, "status": "failed", "output": output}
    assert [json.loads(store.get(key)) for key in store.keys("*:output")] == [output, output]
    failures = [record for record in caplog.records if record.exc_info]
    assert len(failures) == 2
    assert all("The attempt at prediction:" in record.getMessage() for record in failures)


def test_model_that_hangs_is_cancelled_and_named_in_the_log(api, monkeypatch, caplog):
    cancelled = []

    async def model(text):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(text)

    main.settings.PREDICTION_TIMEOUT = 0.2
    monkeypatch.setattr(main, "mock_model", model)
    assert predict(api).status_code == 500
    assert cancelled == ["Some input data"]
    assert "TimeoutError: no result after 0.2 s" in caplog.text


# --- Attempts and leases ----------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The inputs that the model was given, in order; each call has a result of its own."""
    calls = []

    async def model(text):
        calls.append(text)
        result = f"Result {len(calls)}"
        await asyncio.sleep(main.settings.PREDICTION_LATENCY)
        return result

    monkeypatch.setattr(main, "mock_model", model)
    return calls


def orphan(store, text="orphan"):
    """Leave in the store what a killed worker leaves there, after its lease has run out."""
    prediction_id = uuid.uuid4()
    record = json.dumps({"status": "processing", "input": text})
    store.set(f"prediction:{prediction_id}", record, ex=100)
    return f"/predict/{prediction_id}"


def test_orphan_is_taken_over_by_one_poll_of_many(api, store, calls):
    main.settings.PREDICTION_LATENCY = 0.5
    url = api + orphan(store)
    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(requests.get, [url] * 20))
    assert {response.status_code for response in responses} == {202}
    assert poll(url).json()["output"]["result"] == "Result 1"
    assert calls == ["orphan"]


def test_prediction_with_a_lease_is_not_taken_over(api, store, calls):
    path = orphan(store)
    store.set(path.replace("/predict/", "prediction:") + ":lease", "another worker", px=400)
    assert requests.get(api + path).status_code == 202
    assert calls == []
    assert poll(api + path).status_code == 200
    assert calls == ["orphan"]


def test_lease_that_another_poll_takes_first_is_left_to_it(api, store, calls, monkeypatch):
    path = orphan(store)
    key = path.replace("/predict/", "prediction:") + ":lease"
    lease_command = main.lease_command

    def too_late(*args):
        store.set(key, "another worker", px=1_000)
        return lease_command(*args)

    monkeypatch.setattr(main, "lease_command", too_late)
    assert requests.get(api + path).status_code == 202
    assert store.get(key) == b"another worker"
    assert calls == []


def test_first_output_is_final(api, store, monkeypatch):
    calls, released, outputs = [], [], []
    make_attempt = main.make_attempt

    async def model(text):
        calls.append(text)
        result = f"Result {len(calls)}"
        while result not in released:
            await asyncio.sleep(0.01)
        return result

    async def recorded(*args):
        outputs.append(await make_attempt(*args))

    monkeypatch.setattr(main, "mock_model", model)
    monkeypatch.setattr(main, "make_attempt", recorded)
    url = accept(api)
    store.delete(*store.keys("*:lease"))  # as if it had run out
    assert requests.get(url).status_code == 202
    wait_until(lambda: len(calls) == 2)
    released.append("Result 2")
    first = poll(url).json()
    assert first["output"]["result"] == "Result 2"
    released.append("Result 1")
    wait_until(lambda: len(outputs) == 2)
    assert outputs[0] == outputs[1]
    assert requests.get(url).json() == first


def test_synchronous_answer_is_the_first_output(api, store, monkeypatch):
    async def overtaken(text):
        [key] = store.keys()[:1]
        key = key.decode().rsplit(":lease", 1)[0]
        output = {"status": "completed", "input": text, "result": "The other one"}
        store.set(f"{key}:output", json.dumps(output))
        return "Mine"

    monkeypatch.setattr(main, "mock_model", overtaken)
    assert predict(api).json()["output"]["result"] == "The other one"


def test_one_round_trip_before_an_answer(api, monkeypatch):
    main.settings.PREDICTION_LATENCY = 0.5
    round_trips = []
    execute = redis.asyncio.client.Pipeline.execute

    def counted(pipeline, *args, **kwargs):
        round_trips.append(len(pipeline))
        return execute(pipeline, *args, **kwargs)

    monkeypatch.setattr(redis.asyncio.client.Pipeline, "execute", counted)
    url = accept(api)
    assert round_trips == [2]
    assert requests.get(url).status_code == 202
    assert round_trips == [2, 1]
    poll(url)
    del round_trips[:]
    assert requests.get(url).status_code == 200
    assert round_trips == [1]


def test_predictions_are_made_at_once(api, monkeypatch):
    arrived = []

    async def model(text):  # none ends before all have begun
        arrived.append(text)
        while len(arrived) < 200:
            await asyncio.sleep(0.01)
        return text

    monkeypatch.setattr(main, "mock_model", model)
    texts = [str(number) for number in range(200)]
    with ThreadPoolExecutor(200) as pool:
        responses = list(pool.map(partial(predict, api), texts))
    assert {response.status_code for response in responses} == {200}
    assert [response.json()["output"]["result"] for response in responses] == texts


def in_one_batch(*requests_, cancel=None):
    """Send the commands of several requests in one batch; return what each request got."""

    async def send():
        async with fakeredis.FakeAsyncRedis() as client:
            batcher = main.Batcher(client)
            tasks = [asyncio.ensure_future(batcher.execute(*commands)) for commands in requests_]
            await asyncio.sleep(0)
            if cancel is not None:
                tasks[cancel].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(send())


def test_error_of_one_request_is_not_that_of_another():
    one, two, three = in_one_batch(
        [("SET", "a", "1")], [("NONSENSE",)], [("GET", "a"), ("GET", "b")]
    )
    assert one == [True]
    assert isinstance(two, redis.ResponseError)
    assert three == [b"1", None]


@pytest.mark.parametrize("cancelled", [0, 1])
def test_request_that_is_cancelled_leaves_its_batch_alone(cancelled):
    replies = in_one_batch([("ECHO", "0")], [("ECHO", "1")], cancel=cancelled)
    assert isinstance(replies[cancelled], asyncio.CancelledError)
    assert replies[1 - cancelled] == [str(1 - cancelled).encode()]


# --- Workers that end -------------------------------------------------------------------------


def test_killed_worker_loses_nothing(redis_port, start_worker, server, monkeypatch):
    settings = dict(at(redis_port), PREDICTION_TIMEOUT=0.3)
    doomed = start_worker(PREDICTION_LATENCY=LONG, **settings).started()
    with ThreadPoolExecutor(20) as pool:
        urls = list(pool.map(partial(accept, doomed.url), map(str, range(20))))
        doomed.process.kill()
        with served(server, monkeypatch, PREDICTION_LATENCY=0.1, **settings) as heir:
            urls = [url.replace(doomed.url, heir) for url in urls]
            done = [response.json() for response in pool.map(poll, urls)]
            assert [one["status"] for one in done] == ["completed"] * 20
            assert [one["output"]["input"] for one in done] == list(map(str, range(20)))
            assert [response.json() for response in pool.map(requests.get, urls)] == done


def test_worker_told_to_stop_finishes_first(redis_port, start_worker, server, monkeypatch):
    worker = start_worker(PREDICTION_LATENCY=0.5, **at(redis_port)).started()
    url = accept(worker.url)
    worker.process.terminate()
    assert worker.process.wait(LONG) in (0, -signal.SIGTERM)
    with served(server, monkeypatch, **at(redis_port)) as heir:
        assert requests.get(url.replace(worker.url, heir)).json()["status"] == "completed"


def test_worker_cut_short_hands_its_predictions_back(redis_port, start_worker, server, monkeypatch):
    settings = dict(at(redis_port), PREDICTION_TIMEOUT=600)
    hasty = start_worker(
        "--timeout-graceful-shutdown=1", PREDICTION_LATENCY=500, **settings
    ).started()
    with served(server, monkeypatch, PREDICTION_LATENCY=0, **settings) as heir:
        urls = [accept(hasty.url).replace(hasty.url, heir) for _ in range(3)]
        assert {requests.get(url).status_code for url in urls} == {202}
        hasty.process.terminate()
        assert hasty.process.wait(LONG) in (0, -signal.SIGTERM)
        assert [poll(url).json()["status"] for url in urls] == ["completed"] * 3


# --- Redis that comes and goes ----------------------------------------------------------------


def seconds(function, *args):
    """Return how long function(*args) took, and what it returned."""
    start = time.monotonic()
    value = function(*args)
    return time.monotonic() - start, value


@pytest.fixture
def real_api(server, redis_server, monkeypatch):
    """The URL of a live API on the real Redis that a test can kill or freeze."""
    with served(server, monkeypatch, PREDICTION_LATENCY=0.5, **at(redis_server[0])) as url:
        yield url


@real
def test_redis_killed_and_back_loses_nothing(real_api, redis_server, tmp_path, caplog):
    port, processes = redis_server
    main.settings.PREDICTION_LATENCY, main.settings.PREDICTION_TIMEOUT = 0.7, 1
    with ThreadPoolExecutor(20) as pool:
        urls = list(pool.map(partial(accept, real_api), map(str, range(20))))
    stop(processes[-1])
    for request in (partial(requests.get, urls[0]), partial(predict, real_api)):
        duration, response = seconds(request)
        assert (response.status_code, response.json()) == (503, UNAVAILABLE)
        assert response.headers["Retry-After"] == "1"
        assert duration < 2
    assert requests.get(real_api).status_code == 200
    wait_until(lambda: caplog.text.count("may be lost") == 20)  # the outputs had nowhere to go
    processes.append(start_redis(tmp_path / "redis", port))
    with ThreadPoolExecutor(20) as pool:
        done = [response.json()["output"] for response in pool.map(poll, urls)]
    assert [output["status"] for output in done] == ["completed"] * 20
    assert [output["input"] for output in done] == list(map(str, range(20)))


@real
def test_redis_restarted_between_two_requests_goes_unnoticed(real_api, redis_server, tmp_path):
    port, processes = redis_server
    url = accept(real_api)
    before = poll(url).json()
    stop(processes[-1])
    processes.append(start_redis(tmp_path / "redis", port))
    assert requests.get(url).json() == before


@real
def test_frozen_redis_is_503_within_5_s(real_api, redis_server):
    _, processes = redis_server
    url = accept(real_api)
    assert poll(url).status_code == 200
    processes[-1].send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(100) as pool:
        results = list(pool.map(seconds, [requests.get] * 100, [url] * 100))
    assert {response.status_code for _, response in results} == {503}
    assert max(duration for duration, _ in results) < 5
    assert requests.get(real_api).status_code == 200
    processes[-1].send_signal(signal.SIGCONT)
    wait_until(lambda: requests.get(url).status_code == 200)


@real
def test_many_requests_share_few_connections(real_api, redis_server):
    with contextlib.closing(redis.Redis(port=redis_server[0])) as client:
        with ThreadPoolExecutor(200) as pool:
            futures = [pool.submit(predict, real_api) for _ in range(200)]
            wait_until(lambda: len(client.keys("*:lease")) == 200)
            assert client.info("clients")["connected_clients"] < 5
        assert {future.result().status_code for future in futures} == {200}


@real
def test_redis_that_wants_a_password(redis_server, server, monkeypatch, caplog):
    port, _ = redis_server
    with contextlib.closing(redis.Redis(port=port)) as client:
        client.config_set("requirepass", "swordfish")
    settings = {"REDIS_PORT": port, "PREDICTION_LATENCY": 0}  # no REDIS_HOST, but an answer
    with served(server, monkeypatch, REDIS_PASSWORD="swordfish", **settings) as url:
        assert poll(accept(url)).status_code == 200
    assert caplog.text == ""
    with served(server, monkeypatch, **settings) as url:
        response = predict(url)
    assert (response.status_code, response.json()) == (503, UNAVAILABLE)
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_api_that_starts_without_its_redis_is_503(start_worker):
    port = free_port()
    worker = start_worker(**at(port)).started()
    assert len(re.findall(f"ERROR: .*{port}", worker.logged())) == 1
    response = predict(worker.url)
    assert (response.status_code, response.json()) == (503, UNAVAILABLE)
    assert len(re.findall(f"ERROR: .*{port}", worker.logged())) == 2  # the log says which Redis


@real
def test_api_that_starts_before_its_redis_recovers(server, monkeypatch, tmp_path):
    port = free_port()
    with served(server, monkeypatch, PREDICTION_LATENCY=0, **at(port)) as url:
        assert predict(url).status_code == 503
        process = start_redis(tmp_path / "redis", port)
        try:
            assert predict(url).status_code == 200
        finally:
            stop(process)


def test_redis_that_does_not_accept_connections_is_503_within_2_s(server, monkeypatch):
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # more than fit into its queue, so that the next one gets no answer
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        with served(server, monkeypatch, **at(listener.getsockname()[1])) as url:
            duration, response = seconds(predict, url)
    assert (response.status_code, response.json()) == (503, UNAVAILABLE)
    assert duration < 2


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_error_that_redis_py_does_not_wrap_is_503(api, monkeypatch, error):
    async def execute(*args, **kwargs):  # what a connection that was reset can do
        raise error("the transport is closed")

    with monkeypatch.context() as patch:
        patch.setattr(redis.asyncio.client.Pipeline, "execute", execute)
        response = predict(api)
        assert (response.status_code, response.json()) == (503, UNAVAILABLE)
    assert predict(api).status_code == 200


# --- Settings ---------------------------------------------------------------------------------


def test_without_redis_the_api_says_so_and_does_its_job(start_worker):
    worker = start_worker(REDIS_PORT=free_port(), PREDICTION_LATENCY=0.1).started()
    assert poll(accept(worker.url)).json()["status"] == "completed"
    assert worker.logged().count("WARNING") == 1
    assert "Set REDIS_HOST to use a real" in worker.logged()
    worker.process.terminate()
    assert worker.process.wait(LONG) in (0, -signal.SIGTERM)
    assert "Traceback" not in worker.logged()


def test_env_file_is_read_and_its_unknown_keys_are_ignored(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("PREDICTION_LATENCY=0.1\nPREDICTION_TTL=50\nSOMETHING=else\n")
    shutil.copy(str(HERE / "main.py"), str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)  # it is found beside main.py, not where one happens to be
    monkeypatch.setattr(os, "environ", clean_environment(PREDICTION_TTL=60))
    settings = runpy.run_path(str(tmp_path / "main.py"))["settings"]
    assert (settings.PREDICTION_LATENCY, settings.PREDICTION_TTL) == (0.1, 60)
    assert settings.REDIS_PORT == 6379


BAD_SETTINGS = {
    "REDIS_HOST": [""],
    "REDIS_PORT": ["0", "65536", "six"],
    "PREDICTION_LATENCY": ["-1", "nan", "inf", "soon"],
    "PREDICTION_TIMEOUT": ["0", "nan", "inf", ""],
    "PREDICTION_TTL": ["0", "1.5", "1e99", "99999999999999999999"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in BAD_SETTINGS for value in BAD_SETTINGS[name]]
)
def test_bad_setting_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        main.Settings(_env_file=None)


def test_bad_setting_stops_the_start(start_worker):
    worker = start_worker(REDIS_PORT="six", REDIS_PASSWORD="swordfish")
    assert worker.process.wait(LONG) != 0
    assert "REDIS_PORT" in worker.logged()
    assert "swordfish" not in worker.logged()


def test_env_example_lists_every_setting_at_its_default(monkeypatch):
    text = (HERE / ".env.example").read_text(encoding="utf-8")
    assert all(line.startswith("#") for line in text.splitlines() if line)
    lines = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", text, re.MULTILINE))
    for name in lines:
        monkeypatch.delenv(name, raising=False)
    defaults = main.Settings(_env_file=None)
    assert list(lines) == list(main.Settings.model_fields)
    for name, value in lines.items():
        monkeypatch.setenv(name, value)
    assert main.Settings(_env_file=None) == defaults


def test_readme_lists_every_setting_at_its_default():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?(.*?)`? \|", readme, re.MULTILINE)
    defaults = main.Settings.model_construct().model_dump()
    expected = {name: str(value) for name, value in defaults.items()}
    assert dict(rows) == dict(expected, REDIS_PASSWORD="none")


# --- The walkthrough --------------------------------------------------------------------------


def notebook():
    return nbformat.read(str(HERE / "walkthrough.ipynb"), as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(notebook, folder, api_url):
    """Run all cells in a kernel of their own, as Jupyter does on a machine with no Redis."""
    env = clean_environment(API_URL=api_url, PREDICTION_LATENCY=0.1, REDIS_PORT=free_port())
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(folder)}})
    client.execute(env=env)


@pytest.fixture(scope="session", autouse=True)
def walkthroughs(request, folder):
    """Runs of the notebook. Each takes a while, so they go on beside the other tests."""
    if not any(item.name.startswith("test_walkthrough_with") for item in request.session.items):
        yield {}
        return
    free, free_again = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    broken = notebook()
    code_cells(broken)[1].source += "\nassert False, 'this cell fails'"
    settings = {"REDIS_PORT": free_port(), "PREDICTION_LATENCY": 0.1}
    live = Worker(folder, folder / "log", [], settings).started()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # so that the kernel is of this Python
        yield {
            "with an API": (live.url, pool.submit(run, notebook(), folder, live.url)),
            "without": (free, pool.submit(run, notebook(), folder, free)),
            "with a cell that fails": (free_again, pool.submit(run, broken, folder, free_again)),
        }
    live.process.kill()
    live.process.wait()


def test_walkthrough_with_an_api_leaves_it_running(walkthroughs):
    url, done = walkthroughs["with an API"]
    assert done.exception() is None
    assert requests.get(url).status_code == 200


def test_walkthrough_without_an_api_leaves_nothing_running(walkthroughs):
    url, done = walkthroughs["without"]
    assert done.exception() is None
    assert answers(url) is None


def test_walkthrough_with_a_cell_that_fails_leaves_nothing_running(walkthroughs):
    url, done = walkthroughs["with a cell that fails"]
    assert "this cell fails" in str(done.exception())
    assert answers(url) is None


def test_walkthrough_was_saved_from_one_fresh_run():
    cells = code_cells(notebook())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {
        "stream",
        "execute_result",
        "display_data",
    }
    assert all(output.get("name") != "stderr" for output in outputs)
    assert {kind for output in outputs for kind in output.get("data", {})} == {"text/plain"}
    assert not re.search(r"/(home|root|tmp|Users|var|work)/", json.dumps(outputs))


def test_walkthrough_asserts_what_it_claims():
    chapters = "\n".join(
        cell.source if cell.cell_type == "code" else re.sub("(?m)^## .*", "\0", cell.source)
        for cell in notebook().cells
    ).split("\0")[1:-1]  # all but what stands before the first heading, and the end
    assert len(chapters) == 8
    assert all("assert " in chapter for chapter in chapters)


def test_walkthrough_is_easy_to_read():
    cells = code_cells(notebook())
    assert max(len(cell.source.splitlines()) for cell in cells) <= 15
    assert abs(len(notebook().cells) - 2 * len(cells)) <= 2  # prose and code, one to one
