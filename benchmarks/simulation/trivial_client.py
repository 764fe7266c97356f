"""A ClientApp that costs nothing: it sends an array of 100 KB back, with 1 added."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer."""
    (values,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    reply = RecordDict(
        {"arrays": ArrayRecord([values + 1]), "metrics": MetricRecord({"num-examples": 1})}
    )
    return Message(content=reply, reply_to=message)
