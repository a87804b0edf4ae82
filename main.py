"""Mock Model API: how to put a slow model behind FastAPI.

    pip install -r requirements.txt && uvicorn main:app --reload

A client waits for its prediction, or has it made in the background and polls for it. Left out on
purpose: authentication, rate limits, a task queue, and restarting a process that has died.

Predictions are kept in Redis, a server that stores values under keys; without one, fakeredis
imitates it in this process. A prediction has up to three keys:

    prediction:1b9d...          its record, {"status": "processing", "input": "Hi", "attempt": 1}
    prediction:1b9d...:lease    77ab..., a unique name of an attempt
    prediction:1b9d...:output   {"status": "completed", "input": "Hi", "result": "..."}

A worker (a process running this file; uvicorn's option --workers starts several) accepts a
prediction by storing its record, and a lease that lasts a little longer than an attempt may take.
Then it runs the model and stores the output, which is final: "failed" if the model raised or took
too long.

If the worker is killed, or cannot store the output, the lease expires and there is no output. Then
the next GET, at any worker, starts another attempt (so the model may run more than once) or, when
PREDICTION_ATTEMPTS are used up, stores "failed". A client that waits learns the id with the result;
if anything goes wrong before, it has to send its input again.
"""

import asyncio
import logging
import pathlib
import socket
from contextlib import asynccontextmanager, suppress
from enum import Enum
from typing import Any, AsyncIterator, Dict, List, Optional, Union
from uuid import UUID, uuid4

from fakeredis import FakeAsyncRedis
from fastapi import BackgroundTasks, FastAPI, Header, HTTPException, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis.exceptions import RedisError

logger = logging.getLogger("uvicorn.error")  # uvicorn's log, not just errors

# --- Settings: from the environment, else .env beside this file, else these defaults ----------


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=pathlib.Path(__file__).with_name(".env"),
        env_file_encoding="utf-8-sig",  # also with a byte order mark
        extra="ignore",
    )

    REDIS_HOST: str = Field(default="localhost", min_length=1)
    REDIS_PORT: int = Field(default=6379, ge=1, le=65535)
    REDIS_USERNAME: str = ""
    REDIS_PASSWORD: SecretStr = SecretStr("")
    REDIS_TLS: bool = False
    PREDICTION_LATENCY: float = Field(default=2, ge=0, le=86400)  # seconds that mock_model takes
    PREDICTION_TIMEOUT: float = Field(default=10, ge=0.001, le=86400)  # seconds per attempt
    PREDICTION_ATTEMPTS: int = Field(default=3, ge=1, le=1000)
    PREDICTION_TTL: int = Field(default=86400, ge=1, le=10**9)  # seconds until forgotten


settings = Settings()

# --- What clients send and receive, and what is kept in Redis, as JSON ------------------------


class PredictionRequest(BaseModel):
    input: str = Field(max_length=10_000, examples=["Some input data"])


class Status(str, Enum):
    completed = "completed"
    failed = "failed"


class Record(BaseModel):
    status: str = "processing"  # always; for people who look into Redis
    input: str
    attempt: int


class Output(BaseModel):
    status: Status
    input: str
    result: Optional[str] = Field(description="null if the prediction failed")


class Prediction(BaseModel):
    prediction_id: UUID
    status: Status
    output: Output


class Accepted(BaseModel):
    message: str = "Request received. Processing asynchronously."
    prediction_id: UUID


class Message(BaseModel):
    message: str


# --- The API ----------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.redis = await connect()
    # Serve until Ctrl+C or SIGTERM, and finish requests and background tasks. (With its option
    # --timeout-graceful-shutdown, uvicorn cancels those that take longer.)
    yield
    await app.state.redis.aclose()


app = FastAPI(
    title="Mock Model API",
    description="Predictions of a slow model: wait for one, or have it made in the background.",
    lifespan=lifespan,
    redirect_slashes=False,  # /predict/ is 404
    generate_unique_id_function=lambda route: route.name,  # function names in generated clients
)
# Bytes; a larger body is 413. This limit came with FastAPI 0.164, for Python 3.11 and newer.
app.router.max_body_size = 1_000_000


@app.get("/")
async def read_root() -> Message:
    """Greet the client."""
    return Message(message="Welcome to the Mock Model API!")


@app.get("/favicon.ico")
async def read_favicon() -> Message:
    """Answer browsers, which ask for an icon."""
    return Message(message="No favicon")


# --- What the page /docs says about answers other than 200. You may skip this. ----------------


class Detail(BaseModel):
    detail: str


class Invalid(BaseModel):
    detail: List[Dict[str, Any]] = Field(
        examples=[[{"loc": ["body", "input"], "msg": "Field required", "type": "missing"}]]
    )


def answer(detail: str, **more: Any) -> Dict[str, Any]:
    content = {"application/json": {"example": {"detail": detail}}}
    return {"model": Detail, "description": detail, "content": content, **more}


LOCATION = {"Location": {"description": "The path to poll", "schema": {"type": "string"}}}
RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}}
CREATE_ANSWERS: Dict[Any, Any] = {
    202: {"model": Accepted, "description": "Accepted, to be polled.", "headers": LOCATION},
    400: answer("There was an error parsing the body"),  # not UTF-8, say; broken JSON is 422
    413: answer("Content Too Large"),
    422: {"model": Invalid, "description": "The request is not valid."},
    500: answer("Prediction failed."),
    503: answer("Redis is unavailable.", headers=RETRY_AFTER),
}
# 413 is plain text if the header Content-Length says more than max_body_size.
CREATE_ANSWERS[413]["content"]["text/plain"] = {"example": "Content Too Large"}
READ_ANSWERS: Dict[Any, Any] = {
    202: answer("Prediction is still processing.", headers=RETRY_AFTER),
    404: answer("Prediction not found."),
    422: CREATE_ANSWERS[422],
    503: CREATE_ANSWERS[503],
}


# --- The API: predictions ---------------------------------------------------------------------
# FastAPI fills in body from JSON, async_mode from a header, and tasks with an empty list. It sends
# a returned Prediction with status 200, and a returned JSONResponse as it is. Then it runs tasks.
@app.post("/predict", response_model=Prediction, responses=CREATE_ANSWERS)
async def create_prediction(
    body: PredictionRequest,
    tasks: BackgroundTasks,
    async_mode: bool = Header(False, convert_underscores=False, description="true: do not wait"),
    # The same again, since proxies such as nginx drop names with "_".
    hyphenated: bool = Header(False, alias="Async-Mode", include_in_schema=False),
) -> Union[Prediction, JSONResponse]:
    """Make a prediction. Wait for it, or send `async_mode: true` and poll `Location` for it."""
    redis, prediction_id = app.state.redis, uuid4()
    key = f"prediction:{prediction_id}"
    # Accept it, in the same way for both modes: take its lease, which is free since the id is new,
    # and store its record, for PREDICTION_TTL seconds. The two commands share a round trip (see
    # BatchingRedis). If Redis fails, here or below, answer_unavailable sends 503.
    lease, record = new_lease(redis, key), Record(input=body.input, attempt=1)
    await asyncio.gather(
        lease.acquire(), redis.set(key, record.model_dump_json(), ex=settings.PREDICTION_TTL)
    )
    if async_mode or hyphenated:
        tasks.add_task(in_background, redis, key, body.input, lease)
        accepted = Accepted(prediction_id=prediction_id).model_dump(mode="json")
        return JSONResponse(accepted, 202, {"Location": f"/predict/{prediction_id}"})
    # The attempt goes on if the client hangs up. If uvicorn cancels it (see lifespan), the client
    # gets uvicorn's own 500. The lease is left to expire, since nobody can poll without the id.
    output = await make_attempt(redis, key, body.input)
    if output.status is Status.failed:
        raise HTTPException(500, "Prediction failed.")
    return Prediction(prediction_id=prediction_id, status=output.status, output=output)


@app.get("/predict/{prediction_id}", response_model=Prediction, responses=READ_ANSWERS)
async def read_prediction(
    tasks: BackgroundTasks,
    prediction_id: UUID = Path(description="The id of a prediction that was accepted"),
) -> Union[Prediction, JSONResponse]:
    """Read a prediction: 200 if it is completed or failed, 202 if it is not ready yet."""
    redis, key = app.state.redis, f"prediction:{prediction_id}"
    # Three values at once, None for a key that does not exist:
    record, lease, output_json = await redis.mget(key, f"{key}:lease", f"{key}:output")
    if output_json:
        output = Output.model_validate_json(output_json)
        return Prediction(prediction_id=prediction_id, status=output.status, output=output)
    if not record:
        raise HTTPException(404, "Prediction not found.")
    if not lease:  # the worker was killed, say
        await add_next_attempt(redis, key, tasks)  # or store "failed", which the next GET reads
    return JSONResponse({"detail": "Prediction is still processing."}, 202, {"Retry-After": "1"})


# --- Attempts ---------------------------------------------------------------------------------


def new_lease(redis: Redis, key: str) -> Lock:
    """Return a lease, not taken yet: redis-py's lock.

    acquire() sets the key to a unique name unless the key exists, and returns whether it did. The
    key expires a second after the model has to be done, which is time to store the output. (If that
    takes longer, or the worker is frozen, two attempts can be under way. The first output counts.)

    release() deletes the key if it still has that name. Only in_background needs it, for an attempt
    that uvicorn cancels: once there is an output, nobody looks at the lease.
    """
    return redis.lock(f"{key}:lease", timeout=settings.PREDICTION_TIMEOUT + 1, blocking=False)


async def make_attempt(redis: Redis, key: str, text: str) -> Output:
    """Run the model and store its output; return it, or that of an attempt that was faster.

    Raise RedisError if it cannot be stored.
    """
    return await store_output(redis, key, text, await run_model(key, text))


async def store_output(redis: Redis, key: str, text: str, result: Optional[str]) -> Output:
    """Store an output, "failed" if result is None, unless there is one; return what is stored."""
    status = Status.failed if result is None else Status.completed
    output = Output(status=status, input=text, result=result)
    output_json = output.model_dump_json()
    # With nx=True, set() returns None if the key exists, and leaves it as it is. See
    # https://redis.io/docs/latest/commands/set/
    if await redis.set(f"{key}:output", output_json, nx=True, ex=settings.PREDICTION_TTL):
        return output
    first = await redis.get(f"{key}:output")
    return Output.model_validate_json(first or output_json)  # the first may have expired


# --- The mock model: put your own here --------------------------------------------------------
# Load its weights here. If it computes or blocks, it has to run in a thread, or all requests wait
# for it. PREDICTION_TIMEOUT includes the wait for a free thread, and does not stop a busy one.
#
#     from concurrent.futures import ThreadPoolExecutor
#     threads = ThreadPoolExecutor(4)


async def mock_model(text: str) -> str:
    """Return a random result after PREDICTION_LATENCY seconds."""
    # Or: return await asyncio.get_running_loop().run_in_executor(threads, my_model, text)
    await asyncio.sleep(settings.PREDICTION_LATENCY)
    return f"Mock result {uuid4().hex[:8]}"


# --- The machine room: when something fails. You may stop reading here. -----------------------


async def in_background(redis: Redis, key: str, text: str, lease: Lock) -> None:
    """Make an attempt after the answer was sent."""
    try:
        await make_attempt(redis, key, text)
    except RedisError as error:
        logger.error("Redis is unavailable, and an attempt is lost: %s", error)
    except asyncio.CancelledError:  # uvicorn stops, and waits no longer
        # Without a lease, the next GET starts another attempt at once. release() raises RedisError
        # if the lease has expired. So it does with fakeredis, which cannot run the script it sends.
        with suppress(RedisError):
            await lease.release()
        raise


async def add_next_attempt(redis: Redis, key: str, tasks: BackgroundTasks) -> None:
    """Take the lease and add another attempt to tasks, or store "failed" if none is left."""
    lease = new_lease(redis, key)
    if not await lease.acquire():
        return  # another worker was faster
    # Look again: the earlier attempt may have stored its output by now.
    record_json, output_json = await redis.mget(key, f"{key}:output")
    if output_json or not record_json:
        return  # it is finished or expired by now, so nobody needs the lease
    record = Record.model_validate_json(record_json)
    if record.attempt >= settings.PREDICTION_ATTEMPTS:
        logger.error("%s has used up its attempts", key)
        await store_output(redis, key, record.input, None)
        return
    # Stored before the run, so that it counts if the model kills this worker. (If this worker is
    # frozen here until the lease expires, another reads the old number, and makes one too many.)
    record.attempt += 1
    await redis.set(key, record.model_dump_json(), ex=settings.PREDICTION_TTL)
    tasks.add_task(in_background, redis, key, record.input, lease)


async def run_model(key: str, text: str) -> Optional[str]:
    """Return the model's result, or None if it fails or exceeds PREDICTION_TIMEOUT."""
    task = asyncio.create_task(call_model(key, text))
    try:
        # Not wait_for(), which goes on waiting if the model ignores its cancellation.
        await asyncio.wait({task}, timeout=settings.PREDICTION_TIMEOUT)
        if not task.done():
            # If this process was frozen, it may notice the time-out just before the result.
            await asyncio.wait({task}, timeout=0.1)
        return task.result()  # raises InvalidStateError if the task is still not done
    except asyncio.InvalidStateError:
        logger.exception("%s: the model took too long", key)
        return None
    finally:
        task.cancel()  # has no effect on a task that is done


async def call_model(key: str, text: str) -> Optional[str]:
    """Return the model's result, or None if it fails, whatever it raises."""
    try:
        result = await mock_model(text)
        # If the model has cancelled this task, the next await raises CancelledError. Without this
        # one, task.result() would raise it in run_model, as if uvicorn had cancelled the request.
        await asyncio.sleep(0)
        str.encode(result)  # raises unless it is text, and valid Unicode
        return result
    except BaseException:  # also SystemExit, which would end this worker
        with suppress(BaseException):  # some exceptions cannot be printed
            logger.exception("%s: the model has failed or was cancelled", key)
        return None


@app.exception_handler(RedisError)
async def answer_unavailable(request: Request, error: RedisError) -> JSONResponse:
    logger.error("Redis is unavailable: %s", error)
    return JSONResponse({"detail": "Redis is unavailable."}, 503, {"Retry-After": "1"})


@app.exception_handler(RequestValidationError)
async def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Leave out what was sent. FastAPI would repeat it, and fail on NaN, which is not JSON."""
    detail = [{name: item[name] for name in ("loc", "msg", "type")} for item in error.errors()]
    return JSONResponse({"detail": detail}, 422)


class BatchingRedis(Redis):
    """A Redis client that sends the commands of all requests in batches, over one connection.

    The first command starts a batch. While that is under way, commands collect for the next, which
    starts when it is done.

    A plain Redis, with a pool of connections, can take its place, but needed 1.5 times the
    processor time. And no pool of 8, 32 or 100 could do both, as this class can: serve 2,000
    requests at once, and answer 2,000 within 5 s while Redis is frozen.

    See https://redis.io/docs/latest/develop/using-commands/pipelining/
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # redis-py's Pipeline collects commands, sends them at once (here: not as a transaction) and
        # then reads all replies. It does not call execute_command for that (no recursion).
        self.next_batch = self.pipeline(transaction=False)
        self.futures: List[Any] = []  # for the replies to the next batch, one for each command
        self.sending: Any = None  # the task that sends the batch under way, if any

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Execute a command. All of redis-py's commands, such as set(), call this."""
        future = asyncio.get_running_loop().create_future()
        self.next_batch.pipeline_execute_command(*args, **options)  # adds it; sends nothing yet
        self.futures.append(future)
        if not self.sending:
            self.start_next_batch()
        reply = await future
        if isinstance(reply, Exception):
            raise reply
        return reply

    def start_next_batch(self) -> None:
        """Called by the first command, and after each batch, however that ended."""
        self.sending = None
        if self.futures:
            # The task begins at the next turn of the event loop. Commands until then join it.
            self.sending = asyncio.create_task(self.send_batch())
            self.sending.add_done_callback(lambda _: self.start_next_batch())

    async def send_batch(self) -> None:
        batch, self.next_batch = self.next_batch, self.pipeline(transaction=False)
        futures, self.futures = self.futures, []
        try:
            replies = await batch.execute(raise_on_error=False)
        except BaseException as error:  # whatever it is, everyone gets a RedisError
            replies = [RedisError(f"{type(error).__name__}: {error}") for _ in futures]
        for future, reply in zip(futures, replies):
            if not future.done():  # the request that waits for it may have been cancelled
                future.set_result(reply)
        if any(isinstance(reply, Exception) for reply in replies):
            # After an error, connect anew for the next batch. If another Redis has taken over, and
            # REDIS_HOST leads to it now, the old one may still answer, but with an error to writes.
            with suppress(Exception):
                await self.connection_pool.disconnect()

    async def aclose(self, *args: Any) -> None:
        """Close the connection, once nothing is under way.

        That may be the release of a lease: uvicorn does not wait for what it has cancelled.
        """
        while self.sending:
            await asyncio.wait({self.sending})
        await super().aclose(*args)


async def connect() -> Redis:
    """Return a client of Redis, or fakeredis if REDIS_HOST is not set and nothing answers."""
    address = f"{settings.REDIS_HOST}:{settings.REDIS_PORT}"
    if "REDIS_HOST" not in settings.model_fields_set:  # neither in the environment nor in .env
        try:  # blocks, but nothing is served yet
            socket.create_connection((settings.REDIS_HOST, settings.REDIS_PORT), timeout=1).close()
        except OSError:
            logger.warning(
                "No Redis answers at %s, so predictions are kept in this one process and forgotten "
                "when it exits. Set REDIS_HOST to use a real Redis.",
                address,
            )
            return FakeAsyncRedis()
    redis = BatchingRedis(
        host=settings.REDIS_HOST,
        port=settings.REDIS_PORT,
        username=settings.REDIS_USERNAME,  # if both are empty, redis-py does not log in
        password=settings.REDIS_PASSWORD.get_secret_value(),
        ssl=settings.REDIS_TLS,
        ssl_check_hostname=True,
        protocol=2,  # RESP2; with RESP3, redis-py 8 may not notice that a connection was closed
        # Seconds, to connect and to wait for replies. A command waits for two batches at most, the
        # one under way and its own. So if Redis is frozen, it fails within 2 * (0.7 + 1.5) = 4.4 s.
        socket_connect_timeout=0.7,
        socket_timeout=1.5,
        retry=None,  # by default, redis-py 8 would try ten times more
    )
    try:
        await redis.ping()
        logger.info("Predictions are kept in Redis at %s.", address)
    except RedisError as error:
        logger.error("Redis at %s is unavailable, so requests get 503: %s", address, error)
    return redis
