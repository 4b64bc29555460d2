"""What the processes that are left say when another one is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Seen from gloo ("Connection closed by peer", "Connection reset by peer", "Timed out waiting 60000ms for recv"), from
# NCCL ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely",
# "Watchdog caught collective operation timeout") and from the store ("failed to recv, got 0 bytes").
_SIGNS = (
    *("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe"),
    *("timed out waiting", "socket timeout", "failed to recv", "ncclremoteerror", "collective operation timeout"),
)


class LostProcessError(ConnectionError):
    """Another process of the run died or does not answer; the message says which step and what to do."""


@contextmanager
def explain_lost_processes(trainer: Any) -> Iterator[None]:
    """
    Turns what a broken connection raises within the block into one clear error.

    Raises:
        LostProcessError: with process, step, cause and what to do.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if trainer.args.world_size == 1 or not any(sign in text.lower() for sign in _SIGNS):
            raise
        message = (
            f"Step {trainer.state.global_step + 1}, process {trainer.args.process_index} of "
            f"{trainer.args.world_size}: another process is gone or does not answer ({text.splitlines()[0]}). It was "
            "killed (out of memory, a failed node) or stopped with an error: its own log says why. Start all "
            "processes again; train(resume_from_checkpoint=True) continues from the last complete checkpoint."
        )
        logger.error(message)  # at once: the launcher may end this process before Python prints the traceback
        raise LostProcessError(message) from error
