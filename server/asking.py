"""What a run asks its sites beside training: who they are after a restart, and their metrics."""

from __future__ import annotations

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.messages import Evaluated
from anabranch.server.assigning import Assigner
from anabranch.server.desk import Waiting, answers
from anabranch.server.exchange import Exchange
from anabranch.server.flower import Peer, Question, read_evaluated


def meet(exchange: Exchange) -> None:
    """Learn who is connected: a new process asks sites to evaluate before any has trained."""
    started = exchange.clock()
    deadline = started + exchange.connect_s

    def settled() -> bool:
        exchange.invite(deadline)
        return exchange.roster.settled()

    waiting = Waiting(
        why=lambda: "sites say who they are, after a restart",
        who=exchange.missing,
        then="those that are there evaluate",
        since=started,
    )
    exchange.until(settled, deadline, waiting)
    exchange.over()


def metrics(
    exchange: Exchange, assigner: Assigner, number: int, adapter: Adapter, *, due: bool
) -> Question[Evaluated]:
    """Return the metrics of every site that is free and has held-out records, if due."""
    peers: dict[str, Peer] = {}
    if due:
        peers = {name: p for name, p in exchange.roster.available().items() if p.held_out}
    question: Question[Evaluated] = Question("evaluate", number, peers, read_evaluated)
    if peers:
        content = assigner.evaluation(number, adapter)
        exchange.ask(question, dict.fromkeys(peers, content))
        started = exchange.clock()
        waiting = answers(question, started, "the run goes on with the metrics that are here")
        deadline = started + exchange.config.federation.deadline_s
        exchange.until(lambda: all(map(question.heard, peers)), deadline, waiting)
    for name in peers:
        exchange.miss(question, name)
    exchange.close(question)
    return question
