"""Mock Model API: how to put a slow model behind FastAPI.

A client waits for its prediction, or has it made in the background and asks for it later. Redis, a
server that stores values under keys, holds the prediction, so that it outlives the process that
accepted it. (Without Redis, a stand-in will do to try the API.) Left out on purpose:
authentication, rate limits, a task queue. To run the API on the web server uvicorn:

    pip install -r requirements.txt && uvicorn main:app --reload

The words used below:

    prediction id   a random UUID: 1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed
    worker          a process that runs this file; all workers on one Redis share all predictions
    attempt         one run of the model for a prediction, of at most PREDICTION_TIMEOUT seconds
    lease           the right to make an attempt; it runs out by itself

A prediction is three keys in Redis:

    prediction:1b9d...          its record: {"status": "processing", "input": "Hi", "attempt": 1}
    prediction:1b9d...:lease    its lease, here held by this worker: worker-5f0c9a7e
    prediction:1b9d...:output   its output: {"status": "completed", "input": "Hi", "result": "..."}

The output is final. A worker that is killed leaves a record, no output, and a lease that runs out.
The next GET after that, at any worker, starts another attempt, up to PREDICTION_ATTEMPTS in all. So
the model may run more than once for a prediction.
"""

import asyncio
import logging
import pathlib
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any, AsyncIterator, Awaitable, Callable, Dict, List, Optional, Tuple, Union
from uuid import UUID, uuid4

from fakeredis import FakeAsyncRedis
from fastapi import BackgroundTasks, FastAPI, Header, HTTPException, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

logger = logging.getLogger("uvicorn.error")  # uvicorn's log, not only for errors

# --- Settings ---------------------------------------------------------------------------------


class Settings(BaseSettings):
    """Settings come from the environment, else from .env beside this file, else from here."""

    model_config = SettingsConfigDict(
        env_file=pathlib.Path(__file__).with_name(".env"),
        env_file_encoding="utf-8-sig",  # with or without a byte order mark
        extra="ignore",  # whatever else .env holds
    )

    REDIS_HOST: str = Field(default="localhost", min_length=1)
    REDIS_PORT: int = Field(default=6379, ge=1, le=65535)
    REDIS_USERNAME: str = ""
    REDIS_PASSWORD: SecretStr = SecretStr("")
    REDIS_TLS: bool = False
    PREDICTION_LATENCY: float = Field(default=2, ge=0, le=86400)  # seconds, of the mock model
    PREDICTION_TIMEOUT: float = Field(default=10, ge=0.001, le=86400)  # seconds
    PREDICTION_ATTEMPTS: int = Field(default=3, ge=1, le=1000)
    PREDICTION_TTL: int = Field(default=86400, ge=1, le=10**9)  # seconds that Redis keeps it


settings = Settings()

# --- What clients send and receive ------------------------------------------------------------


class PredictionRequest(BaseModel):
    input: str = Field(max_length=10_000, examples=["Some input data"])


class Status(str, Enum):
    completed = "completed"
    failed = "failed"


class Output(BaseModel):
    status: Status
    input: str
    result: Optional[str] = Field(description="null if the prediction failed")


class Prediction(BaseModel):
    prediction_id: UUID
    status: Status
    output: Output


class Accepted(BaseModel):
    message: str = Field(examples=["Request received. Processing asynchronously."])
    prediction_id: UUID


class Message(BaseModel):
    message: str


class Detail(BaseModel):
    detail: str


class Problem(BaseModel):
    loc: List[Union[str, int]] = Field(examples=[["body", "input"]])
    msg: str = Field(examples=["Field required"])
    type: str = Field(examples=["missing"])


class Invalid(BaseModel):
    detail: List[Problem]


# --- The API ----------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.redis = await connect()
    app.state.replacing = asyncio.Lock()  # see replace
    yield  # while the worker serves requests, until it is told to stop (Ctrl+C, SIGTERM)
    # By now, requests and background tasks are finished, or cancelled if they took longer than
    # uvicorn's --timeout-graceful-shutdown. Cancelled attempts are giving up their leases, one by
    # one, with this lock. It is fair, so this waits until they have (but not for ever).
    await asyncio.wait_for(app.state.replacing.acquire(), timeout=5)
    await app.state.redis.aclose()


app = FastAPI(
    title="Mock Model API",
    description="Predictions of a slow model: wait for one, or have it made in the background.",
    lifespan=lifespan,
    redirect_slashes=False,  # /predict/ is 404
    generate_unique_id_function=lambda route: route.name,  # names for generated clients
)
app.router.max_body_size = 1_000_000  # bytes; FastAPI ignores it before version 0.164


@app.get("/")
async def read_root() -> Message:
    """Say welcome."""
    return Message(message="Welcome to the Mock Model API!")


@app.get("/favicon.ico")
async def read_favicon() -> Message:
    """Answer browsers, which ask for an icon."""
    return Message(message="No favicon")


# What the docs page, /docs, says of each status but 200. You may skip it.
RETRY = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}}
LOCATION = {"Location": {"description": "The path to poll", "schema": {"type": "string"}}}


def answer(detail: str, **more: Any) -> Dict[str, Any]:
    content = {"application/json": {"example": {"detail": detail}}}
    return {"model": Detail, "description": detail, "content": content, **more}


INVALID = {"model": Invalid, "description": "The request is not valid."}
TOO_LARGE = answer("Content Too Large")  # in JSON if the body is sent in chunks, else as text
TOO_LARGE["content"]["text/plain"] = {"example": "Content Too Large"}
CREATE_ANSWERS: Dict[Any, Any] = {
    202: {"model": Accepted, "description": "Accepted, to be polled.", "headers": LOCATION},
    400: answer("There was an error parsing the body"),
    413: TOO_LARGE,
    422: INVALID,
    500: answer("Prediction failed."),
    503: answer("Redis is unavailable.", headers=RETRY),
}
READ_ANSWERS: Dict[Any, Any] = {
    202: answer("Prediction is still processing.", headers=RETRY),
    404: answer("Prediction not found."),
    422: INVALID,
    503: answer("Redis is unavailable.", headers=RETRY),
}


@app.post("/predict", response_model=Prediction, responses=CREATE_ANSWERS)
async def create_prediction(
    body: PredictionRequest,
    tasks: BackgroundTasks,  # FastAPI runs them once the answer has been sent
    async_mode: bool = Header(False, convert_underscores=False, description="true: do not wait"),
    # The same header for those behind a proxy such as nginx, which drops names with "_".
    hyphenated: bool = Header(False, alias="Async-Mode", include_in_schema=False),
) -> Union[Prediction, JSONResponse]:
    """Make a prediction. Wait for it, or send `async_mode: true` and poll `Location` for it."""
    redis = app.state.redis
    prediction_id = uuid4()
    key = f"prediction:{prediction_id}"
    record = Record(input=body.input).model_dump_json()
    # Both in one round trip, see BatchingRedis. If Redis fails, the answer is 503, without an id.
    await asyncio.gather(take_lease(redis, key), redis.set(key, record, ex=settings.PREDICTION_TTL))
    if async_mode or hyphenated:
        tasks.add_task(in_background, make_attempt, redis, key, body.input)
        message = "Request received. Processing asynchronously."
        content = {"message": message, "prediction_id": str(prediction_id)}
        return JSONResponse(content, 202, {"Location": f"/predict/{prediction_id}"})
    output = await make_attempt(redis, key, body.input)
    if output.status is Status.failed:
        raise HTTPException(500, "Prediction failed.")
    return Prediction(prediction_id=prediction_id, status=output.status, output=output)


@app.get("/predict/{prediction_id}", response_model=Prediction, responses=READ_ANSWERS)
async def read_prediction(
    tasks: BackgroundTasks,
    prediction_id: UUID = Path(description="The id of a prediction that was accepted"),
) -> Union[Prediction, JSONResponse]:
    """Read a prediction. 202 means that it is not ready yet: ask again."""
    redis = app.state.redis
    key = f"prediction:{prediction_id}"
    record, lease, output_json = await redis.mget(key, f"{key}:lease", f"{key}:output")
    if output_json:
        output = Output.model_validate_json(output_json)
        return Prediction(prediction_id=prediction_id, status=output.status, output=output)
    if not record:
        raise HTTPException(404, "Prediction not found.")
    if not lease:
        tasks.add_task(in_background, make_next_attempt, redis, key)
    return JSONResponse({"detail": "Prediction is still processing."}, 202, {"Retry-After": "1"})


# --- Attempts ---------------------------------------------------------------------------------
# redis.set() takes ex or px, the seconds or milliseconds until the key expires, and nx: set it only
# if it does not exist. Of two workers that try that at once, one succeeds, since Redis carries out
# one command at a time. See https://redis.io/docs/latest/commands/set/

WORKER = f"worker-{uuid4().hex[:8]}"


class Record(BaseModel):
    status: str = "processing"
    input: str
    attempt: int = 1


async def take_lease(redis: Redis, key: str) -> bool:
    """Return whether this worker gets the lease: not if there is one already.

    It lasts a second longer than an attempt, to leave time for storing the output.
    """
    milliseconds = int(settings.PREDICTION_TIMEOUT * 1000) + 1000
    return bool(await redis.set(f"{key}:lease", WORKER, nx=True, px=milliseconds))


async def make_attempt(redis: Redis, key: str, text: str) -> Output:
    """Run the model and store its output; return the output that was stored first.

    Raise RedisError if Redis fails. Then a GET after the end of the lease starts another attempt.
    """
    model = asyncio.ensure_future(run_model(key, text))
    try:
        # Subtle: asyncio.wait_for would go on waiting for a model that ignores its cancellation.
        await asyncio.wait({model}, timeout=settings.PREDICTION_TIMEOUT)
        if not model.done():  # a model in a thread, on a worker that was frozen, needs a moment
            await asyncio.sleep(0.1)
    except asyncio.CancelledError:  # of this attempt, see lifespan
        model.cancel()
        await replace(redis, f"{key}:lease", WORKER.encode(), None)
        raise
    try:
        output = model.result()
    except (
        asyncio.InvalidStateError,
        asyncio.CancelledError,
    ):  # no result yet, or cancelled itself
        model.cancel()
        logger.exception("The model has not completed %s in time", key)
        output = Output(status=Status.failed, input=text, result=None)
    return await store_output(redis, key, output)


async def run_model(key: str, text: str) -> Output:
    """Return the model's output: failed, if it raises or does not return text."""
    try:
        result = await mock_model(text)
        result.encode()  # raises unless it is text that can be stored
        return Output(status=Status.completed, input=text, result=result)
    except BaseException:  # CancelledError, too, and SystemExit, which would end the server
        logger.exception("The model has not completed %s", key)
        return Output(status=Status.failed, input=text, result=None)


async def store_output(redis: Redis, key: str, output: Output) -> Output:
    """Store an output unless there is one, which never changes; return what is stored."""
    value, seconds = output.model_dump_json(), settings.PREDICTION_TTL
    if await redis.set(f"{key}:output", value, nx=True, ex=seconds):
        return output
    first = await redis.get(f"{key}:output")
    return Output.model_validate_json(first) if first else output  # it may have expired


async def make_next_attempt(redis: Redis, key: str) -> None:
    """Make another attempt at a prediction, if this worker gets the lease and one is left."""
    if not await take_lease(redis, key):
        return
    record_json, output = await redis.mget(key, f"{key}:output")
    if output or not record_json:
        return
    record = Record.model_validate_json(record_json)
    if record.attempt < settings.PREDICTION_ATTEMPTS:
        record.attempt += 1
        # Subtle: if this worker was frozen until its lease ran out, another may have counted.
        if await replace(redis, key, record_json, record.model_dump_json()):
            await make_attempt(redis, key, record.input)
    else:
        logger.error("%s has used up its attempts", key)
        failed = Output(status=Status.failed, input=record.input, result=None)
        await store_output(redis, key, failed)


async def replace(redis: Redis, key: str, old: Any, new: Optional[str]) -> bool:
    """Set a key (or delete it, for None) if it still has its old value; return whether it had.

    See https://redis.io/docs/latest/develop/using-commands/transactions/
    """
    # This needs a connection of its own. Because of the lock, one is enough for all.
    async with app.state.replacing, redis.pipeline() as pipeline:
        await pipeline.watch(key)
        if await pipeline.get(key) != old:
            return False
        pipeline.multi()  # what comes after this is sent by execute()
        if new is None:
            pipeline.delete(key)
        else:
            pipeline.set(key, new, ex=settings.PREDICTION_TTL)
        # Raises WatchError, a RedisError, if the key has changed since watch().
        await pipeline.execute()
        return True


async def in_background(attempt: Callable[..., Awaitable[Any]], *args: Any) -> None:
    """Make an attempt after the answer has been sent, so that an error can only be logged."""
    try:
        await attempt(*args)
    except RedisError as error:
        logger.error("Redis fails, and an attempt is lost: %s", error)


# --- The mock model: put your own here --------------------------------------------------------


async def mock_model(text: str) -> str:
    """Return a random result after PREDICTION_LATENCY seconds.

    While code in here computes or blocks, all requests wait, so run such a model in a thread. (The
    thread goes on after a time-out.) Load its weights once, above this function.

        return await asyncio.get_running_loop().run_in_executor(None, my_model, text)
    """
    await asyncio.sleep(settings.PREDICTION_LATENCY)
    return f"Mock result {uuid4().hex[:8]}"


# --- The machine room, where you may stop reading: error answers, and the connection to Redis --


@app.exception_handler(RedisError)
async def answer_unavailable(request: Request, error: RedisError) -> JSONResponse:
    logger.error("Redis is unavailable: %s", error)
    return JSONResponse({"detail": "Redis is unavailable."}, 503, {"Retry-After": "1"})


@app.exception_handler(RequestValidationError)
async def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Leave out the input. FastAPI would repeat it, and fail if it is NaN: that is not JSON."""
    detail = [{name: item[name] for name in ("loc", "msg", "type")} for item in error.errors()]
    return JSONResponse({"detail": detail}, 422)


class BatchingRedis(Redis):
    """A Redis client that sends the commands of all requests in batches, over one connection.

    Methods such as set() call execute_command(). Commands that come while a batch is under way go
    out together in the next, so each waits for two batches at most. With an ordinary client and its
    pool of connections, a request took twice as long. And no pool, of 8, 32 or 100, passed both
    tests: serve 2,000 POSTs at once, and tell 2,000 clients within 5 s that Redis is frozen.
    See https://redis.io/docs/latest/develop/using-commands/pipelining/
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.waiting: List[Tuple[Any, Any, "asyncio.Future[Any]"]] = []
        self.sender: "Optional[asyncio.Future[None]]" = None

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        reply = asyncio.get_running_loop().create_future()
        self.waiting.append((args, options, reply))
        if self.sender is None or self.sender.done():
            self.sender = asyncio.ensure_future(self.send_batches())
        return await reply

    async def send_batches(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting, []
            try:
                pipeline = self.pipeline(transaction=False)
                for args, options, _ in batch:
                    pipeline.pipeline_execute_command(*args, **options)  # execute() sends them
                replies = await pipeline.execute(raise_on_error=False)
                if any(isinstance(reply, RedisError) for reply in replies):
                    # This may be a replica, after a failover. The next batch connects anew.
                    await self.connection_pool.disconnect()
            except RedisError as error:
                replies = [error] * len(batch)
            except BaseException as error:  # so that nobody is left waiting
                replies = [RedisError(repr(error))] * len(batch)
            for (_, _, reply), value in zip(batch, replies):
                if reply.done():  # its request was cancelled
                    continue
                if isinstance(value, BaseException):
                    reply.set_exception(value)
                else:
                    reply.set_result(value)


async def connect() -> Redis:
    """Return a client of Redis, or of a stand-in if REDIS_HOST is not set and nothing answers."""
    host, port = settings.REDIS_HOST, settings.REDIS_PORT
    address = f"{host}:{port}"
    if "REDIS_HOST" not in settings.model_fields_set:
        try:
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
        except OSError:
            logger.warning(
                f"No Redis answers at {address}, so predictions are kept in this one process and "
                "forgotten when it exits. Set REDIS_HOST to use a real Redis."
            )
            return FakeAsyncRedis()
    redis = BatchingRedis(
        host=host,
        port=port,
        username=settings.REDIS_USERNAME or None,
        password=settings.REDIS_PASSWORD.get_secret_value() or None,
        ssl=settings.REDIS_TLS,
        ssl_check_hostname=True,
        protocol=2,  # its version; with 3, redis-py 8 overlooks that a connection is closed
        socket_connect_timeout=0.9,  # seconds, or 1.8 for two batches
        socket_timeout=2,  # seconds, or 4 for two batches
        retry=Retry(NoBackoff(), 0),  # no retries
    )
    try:
        await redis.ping()
        logger.info("Predictions are kept in Redis at %s.", address)
    except RedisError as error:
        logger.error("Redis at %s is unavailable, requests get 503: %s", address, error)
    return redis
