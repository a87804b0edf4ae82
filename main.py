"""Mock Model API: how to put a slow model behind FastAPI.

A client waits for its prediction, or has it made in the background and polls for it. Either way
Redis holds the prediction, so it outlives the process that accepted it. (Where there is no Redis,
a stand-in within the process does for a demonstration.) Left out on purpose: authentication, rate
limits, a task queue; README.md says when to move to one. To run it:

    pip install -r requirements.txt && uvicorn main:app --reload

The words used below:

    prediction id   a random UUID that names one prediction: 1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed
    worker          a process that runs this file; all workers on one Redis share all predictions
    accepted        the record of the prediction is in Redis, so it can outlive its worker
    attempt         one run of the model for a prediction, given up after PREDICTION_TIMEOUT
    lease           a worker's right to make an attempt; it expires, also if the worker was killed
    poll            a GET that asks how a prediction is doing
    status          processing, then completed or failed, which are final

A prediction is three keys in Redis, its record, its lease and its output:

    prediction:1b9d...          {"status": "processing", "input": "Some input data"}
    prediction:1b9d...:lease    web-1:4711, the host and the process id of the worker
    prediction:1b9d...:output   {"status": "completed", "input": "Some input data", "result": "..."}

Record and output are written once and never changed, so no two updates can race. If a worker is
killed, it leaves a record, no output, and a lease that expires. The next poll after that, at any
worker, takes the lease and makes a second attempt. So the model may run more than once for a
prediction (at least once, not exactly once), but only the first output is kept.
"""

import asyncio
import json
import logging
import os
import socket
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, AsyncIterator, List, Optional, Set, Tuple, Union
from uuid import UUID, uuid4

from fakeredis import FakeAsyncRedis
from fastapi import BackgroundTasks, Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

logger = logging.getLogger("uvicorn.error")  # despite its name, for more than errors

# --- Settings ---------------------------------------------------------------------------------


class Settings(BaseSettings):
    """Read from the environment, else from .env beside this file, else the default."""

    model_config = SettingsConfigDict(env_file=Path(__file__).with_name(".env"), extra="ignore")

    REDIS_HOST: str = Field(default="localhost", min_length=1)
    REDIS_PORT: int = Field(default=6379, ge=1, le=65535)
    REDIS_PASSWORD: SecretStr = SecretStr("")  # empty: no password
    PREDICTION_LATENCY: float = Field(default=2, ge=0, le=86400)  # seconds
    PREDICTION_TIMEOUT: float = Field(default=10, ge=0.001, le=86400)  # seconds
    PREDICTION_TTL: int = Field(default=86400, ge=1, le=10**9)  # seconds: time-to-live in Redis


settings = Settings()

# --- Models: what clients send and receive ----------------------------------------------------


class PredictionRequest(BaseModel):
    input: str = Field(max_length=10_000, examples=["Some input data"])


class Status(str, Enum):
    completed = "completed"
    failed = "failed"


class Output(BaseModel):
    status: Status
    input: str
    result: Optional[str]  # null if the prediction failed


class Prediction(BaseModel):
    prediction_id: UUID
    status: Status
    output: Output


class Accepted(BaseModel):
    message: str
    prediction_id: UUID


class Message(BaseModel):
    message: str


class Detail(BaseModel):
    detail: str


# --- Redis: where predictions are kept --------------------------------------------------------

WORKER = f"{socket.gethostname()}:{os.getpid()}"
running: Set[str] = set()  # keys of the predictions that this worker has begun and not yet stored


class Batcher:
    """Sends the commands of all requests to Redis over one connection, a batch at a time.

    Commands that come while a batch is under way go out together in the next one. So 2,000
    requests at once need one connection, and each of them waits for two batches at most.
    See https://redis.io/docs/latest/develop/using-commands/pipelining/
    """

    def __init__(self, client: Redis) -> None:
        self.client, self.turn = client, asyncio.Lock()
        self.batch = client.pipeline(transaction=False)

    async def execute(self, *commands: Tuple[Any, ...]) -> List[Any]:
        """Return Redis's reply to each command; raise RedisError if one is missing or an error."""
        start = len(self.batch)
        if start == 0:
            self.replies = asyncio.ensure_future(self._send())
        for command in commands:
            self.batch.execute_command(*command)  # adds it to the batch
        # Subtle: a batch is shared, so a request that is cancelled must not cancel it.
        replies = (await asyncio.shield(self.replies))[start : start + len(commands)]
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        return replies

    async def _send(self) -> List[Any]:
        async with self.turn:
            batch, self.batch = self.batch, self.client.pipeline(transaction=False)
            try:
                return await batch.execute(raise_on_error=False)
            except Exception as error:  # redis-py does not turn all of them into a RedisError
                raise RedisError(f"{type(error).__name__}: {error}") from error


async def connect() -> Redis:
    """Return a client of Redis; if REDIS_HOST is not set and nothing answers, of a stand-in."""
    if "REDIS_HOST" not in settings.model_fields_set:
        try:
            _, writer = await asyncio.open_connection(settings.REDIS_HOST, settings.REDIS_PORT)
            writer.close()
        except OSError:
            logger.warning(
                "No Redis answers, so predictions are kept in this one process and forgotten "
                "when it exits. Set REDIS_HOST to use a real Redis."
            )
            return FakeAsyncRedis()
    client = Redis(
        host=settings.REDIS_HOST,
        port=settings.REDIS_PORT,
        password=settings.REDIS_PASSWORD.get_secret_value(),
        protocol=2,  # with 3, redis-py 8 does not notice that Redis has closed a connection
        socket_connect_timeout=0.9,  # seconds
        socket_timeout=2,  # seconds
        retry=Retry(NoBackoff(), 0),  # none: the caller of the API gets 503 and may retry
    )
    try:
        await client.ping()
    except RedisError as error:
        logger.error("Redis is unavailable, requests get 503 until it is back: %s", error)
    return client


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    client = await connect()
    app.state.redis = redis = Batcher(client)
    yield
    if running:  # cut short, or not stored: without a lease, the next poll makes them again
        with suppress(RedisError):
            await redis.execute(("DEL", *(f"{key}:lease" for key in running)))
    await client.aclose()


async def get_redis(request: Request) -> Batcher:
    redis: Batcher = request.app.state.redis
    return redis


def lease_command(key: str) -> Tuple[Any, ...]:
    """Return the command that takes the lease of a prediction; the reply is nil if it is taken.

    See https://redis.io/docs/latest/commands/set/#patterns. The lease lasts a second longer than
    an attempt may, to let one that timed out be stored as failed before anyone makes another.
    """
    milliseconds = int(settings.PREDICTION_TIMEOUT * 1000) + 1000
    return ("SET", f"{key}:lease", WORKER, "NX", "PX", milliseconds)


# --- Mock model: edit this one function to use your own ---------------------------------------


async def mock_model(text: str) -> str:
    """Return a random result after PREDICTION_LATENCY: text in, text out.

    While code in here computes or blocks, all requests wait. Run a model that does so in a thread:

        return await asyncio.get_running_loop().run_in_executor(None, my_model, text)
    """
    await asyncio.sleep(settings.PREDICTION_LATENCY)
    return f"Mock result {uuid4().hex[:8]}"


# --- Background task: an attempt at a prediction ----------------------------------------------


async def make_attempt(redis: Batcher, key: str, text: str) -> Output:
    """Run the model and store its output; return the output that was stored first."""
    running.add(key)
    model = asyncio.ensure_future(mock_model(text))
    # Subtle: wait_for would go on waiting for a model that ignores its cancellation. If uvicorn
    # stops this worker early, it cancels the next line, and lifespan finds the key in running.
    await asyncio.wait({model}, timeout=settings.PREDICTION_TIMEOUT)
    try:
        if model.cancel():  # it was still running
            raise asyncio.TimeoutError(f"no result after {settings.PREDICTION_TIMEOUT} s")
        result = model.result()
        output = Output(status=Status.completed, input=text, result=result).model_dump_json()
    except (Exception, asyncio.CancelledError):  # all that the model can raise
        logger.exception("The attempt at %s failed", key)
        output = Output(status=Status.failed, input=text, result=None).model_dump_json()
    # Subtle: NX keeps the output that came first, so what a client has seen never changes.
    _, first = await redis.execute(
        ("SET", f"{key}:output", output, "NX", "EX", settings.PREDICTION_TTL),
        ("GET", f"{key}:output"),
    )
    running.discard(key)
    return Output.model_validate_json(first)


async def make_attempt_in_background(redis: Batcher, key: str, text: str) -> None:
    try:
        await make_attempt(redis, key, text)
    except RedisError as error:  # once the lease has expired, a poll starts another attempt
        logger.error("The output of %s may be lost: %s", key, error)


# --- Routes -----------------------------------------------------------------------------------

app = FastAPI(title="Mock Model API", lifespan=lifespan, redirect_slashes=False)
app.router.max_body_size = 1_000_000  # bytes; an older FastAPI takes no notice


@app.exception_handler(RedisError)
async def answer_unavailable(request: Request, error: RedisError) -> JSONResponse:
    logger.error("Redis is unavailable: %s", error)
    return JSONResponse({"detail": "Redis is unavailable."}, 503, {"Retry-After": "1"})


@app.exception_handler(RequestValidationError)
async def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answer without the input, which FastAPI would repeat: it may hold NaN, which is not JSON."""
    detail = [{name: item[name] for name in ("loc", "msg", "type")} for item in error.errors()]
    return JSONResponse({"detail": detail}, 422)


@app.get("/")
async def read_root() -> Message:
    return Message(message="Welcome to the Mock Model API!")


@app.get("/favicon.ico")
async def read_favicon() -> Message:
    return Message(message="No favicon")


UNAVAILABLE = {"model": Detail, "description": "Redis is unavailable; see `Retry-After`"}


@app.post(
    "/predict",
    response_model=Prediction,
    responses={
        202: {"model": Accepted, "description": "Accepted; poll the address in `Location`"},
        400: {"model": Detail, "description": "The body cannot be decoded"},
        413: {"model": Detail, "description": "The body is over 1 MB"},
        500: {"model": Detail, "description": "The model failed or timed out"},
        503: UNAVAILABLE,
    },
)
async def create_prediction(
    body: PredictionRequest,
    tasks: BackgroundTasks,
    async_mode: bool = Header(default=False, convert_underscores=False),
    # The same header for clients behind a proxy such as nginx, which drops names with "_".
    hyphenated: bool = Header(default=False, alias="Async-Mode", include_in_schema=False),
    redis: Batcher = Depends(get_redis),
) -> Union[Prediction, JSONResponse]:
    """Make a prediction now, or in the background if `async_mode` is true.

    The answer is then 202 Accepted: https://www.rfc-editor.org/rfc/rfc9110#section-15.3.3
    """
    prediction_id = uuid4()
    key = f"prediction:{prediction_id}"
    record = json.dumps({"status": "processing", "input": body.input})
    # The record comes last: a lease without a record is harmless, it expires.
    await redis.execute(lease_command(key), ("SET", key, record, "EX", settings.PREDICTION_TTL))
    if async_mode or hyphenated:
        tasks.add_task(make_attempt_in_background, redis, key, body.input)
        message = "Request received. Processing asynchronously."
        answer = {"message": message, "prediction_id": str(prediction_id)}
        return JSONResponse(answer, 202, {"Location": f"/predict/{prediction_id}"})
    output = await make_attempt(redis, key, body.input)
    if output.status is Status.failed:
        raise HTTPException(500, "Prediction failed.")
    return Prediction(prediction_id=prediction_id, status=output.status, output=output)


@app.get(
    "/predict/{prediction_id}",
    response_model=Prediction,
    responses={
        202: {"model": Detail, "description": "Still processing; see `Retry-After`"},
        404: {"model": Detail, "description": "Unknown or expired"},
        503: UNAVAILABLE,
    },
)
async def read_prediction(
    prediction_id: UUID, tasks: BackgroundTasks, redis: Batcher = Depends(get_redis)
) -> Union[Prediction, JSONResponse]:
    """Answer a poll. If nobody holds the lease of an unfinished prediction, take it over."""
    key = f"prediction:{prediction_id}"
    keys = (key, f"{key}:lease", f"{key}:output")
    [[record, lease, final]] = await redis.execute(("MGET", *keys))
    if final:
        output = Output.model_validate_json(final)
        return Prediction(prediction_id=prediction_id, status=output.status, output=output)
    if not record:
        raise HTTPException(404, "Prediction not found.")
    if not lease:
        [taken] = await redis.execute(lease_command(key))
        if taken:  # and not by another poll at the same moment
            tasks.add_task(make_attempt_in_background, redis, key, json.loads(record)["input"])
    return JSONResponse({"detail": "Prediction is still processing."}, 202, {"Retry-After": "1"})
