"""The ClientApp of the Flower peer: importable, so that an actor keeps model and records."""

from __future__ import annotations

from functools import lru_cache

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.simulation.peer import Peer, jobs, put, values

app = ClientApp()


@lru_cache(maxsize=1)
def peer(place: int) -> Peer:
    """Return model and records of a job; made once in every actor."""
    return Peer(jobs()[place])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the client whose turn it is."""
    turn = message.content.config_records["turn"]
    job, number, place = (int(str(turn[name])) for name in ("job", "round", "place"))
    held = peer(job)
    put(held.parameters, message.content.array_records["arrays"].to_torch_state_dict())
    client, order = held.plan[number][place]
    held.train(client, order)
    reply = RecordDict(
        {
            "arrays": ArrayRecord(values(held.parameters)),
            "metrics": MetricRecord({"num-examples": len(order)}),
        }
    )
    return Message(content=reply, reply_to=message)
