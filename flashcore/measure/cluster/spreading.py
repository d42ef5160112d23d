"""Give tasks to Dask workers, and take care of those that die, hang or lose their card.

Dask carries calls and answers, knows which workers there are, and starts new ones. Which worker gets which task is
decided here, so that for each moment it is known what runs on which card: a timing runs alone, and what a dead worker
was doing is done by another one. A worker that has a crew does several tasks at a time, as long as none times anything.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flashcore.errors import ClusterError, ClusterLost
from flashcore.gpu.isolation import START_S
from flashcore.measure.cluster import connecting
from flashcore.measure.cluster.places import Place, identify, place_of, refuse_foreign, refuse_mixed
from flashcore.measure.cluster.seats import CREW, HOST, RESOURCES, Agenda, Call, Job, Seat, threads_of
from flashcore.measure.cluster.serving import Answer, By, answer
from flashcore.measure.cluster.tasks import Work, packed
from flashcore.records import Trial

TOPIC = "flashcore"
"""The topic of Dask's events that tells who watches what each worker does."""
MOST_TRIES = 2
"""Workers that one task may take with it; then the task itself is at fault, and its record says so."""
EMPTY_S = 120.0
"""Seconds without a worker until those that are left to do are given up; a worker that died comes back by then."""
GRACE_S = 60.0
"""Seconds beyond the limit of a task after which its worker, which should have ended it, counts as hung."""
LOOK_S = 0.5
"""Seconds between two looks at which workers there are."""
FIX = "start one a card with 'CUDA_VISIBLE_DEVICES=0 dask worker ADDRESS --nthreads 1 --nworkers 1 --resources GPU=1'"


class Spread:
    """The workers of one Dask scheduler.

    Parameters
    ----------
    address
        Of the scheduler, such as ``tcp://10.0.0.1:8786``.
    mixed
        Take workers whatever their cards and software are, as a comparison of cards does.
    grace_s, empty_s
        Other limits than `GRACE_S` and `EMPTY_S`.

    Raises
    ------
    ClusterError
        Nothing answers there.
    ToolMissing
        Dask is not installed.
    """

    def __init__(self, address: str, *, mixed: bool = False, grace_s: float = GRACE_S, empty_s: float = EMPTY_S):
        self.address, self.mixed = address, mixed
        self.client = connecting.connected(address)
        self._mine = place_of(identify(), "this process")
        self._grace_s, self._empty_s = grace_s, empty_s
        self._seats: dict[str, Seat] = {}
        self._answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._tokens = itertools.count(1)
        self._looked = self._last_seen = 0.0
        self._refused: list[tuple[str, str]] = []

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that work, in the order of their nodes and cards."""
        found = [seat.place for seat in self._seats.values() if seat.place is not None and not seat.barred]
        return tuple(sorted(found, key=lambda p: (p.node, p.name, p.key)))

    @property
    def _fix(self) -> str:
        return FIX.replace("ADDRESS", self.address)

    def close(self) -> None:
        """Leave the scheduler; the workers stay."""
        self.client.close(timeout=connecting.CONNECT_S)

    def _asked(self, what: str, **arguments: Any) -> Any:
        """What the scheduler answers to one of its calls; an error of whatever kind where it does not in time."""
        call = getattr(self.client.scheduler, what)
        return self.client.sync(call, **arguments, callback_timeout=connecting.CONNECT_S)

    # ---------------------------------------------------------------------------------------------- at the start

    def await_workers(self, count: int | None = None, *, timeout_s: float, strict: bool = True) -> None:
        """Wait until workers have said what they are.

        Parameters
        ----------
        count
            How many; None for those that the scheduler has now.
        strict
            Whether one that cannot be used is an error; otherwise the others do its work, and a record says so.

        Raises
        ------
        ClusterError
            One of them cannot be used, or there are too few when the time is up.
        """
        until = time.monotonic() + timeout_s
        while True:
            self._look(at_once=True)
            self._hear(LOOK_S)
            if self._refused and strict:
                raise ClusterError(self._refused[0][1])
            asked = [seat for seat in self._seats.values() if seat.place is None and not seat.barred]
            if not asked and len(self.places) >= (count or 1):
                break
            if time.monotonic() > until:
                raise ClusterError(self._too_few(count, timeout_s))

    def _too_few(self, count: int | None, timeout_s: float) -> str:
        if not self._seats and count is None:
            return f"The scheduler at {self.address} has no worker; {self._fix}."
        if self._refused and not self.places:
            return self._refused[0][1]  # there is no log that would say so
        wanted = count or len(self._seats)
        return (
            f"Only {len(self.places)} of {wanted} workers at {self.address} were ready within {timeout_s:g} s; see "
            "their logs, or ask for fewer."
        )

    # ---------------------------------------------------------------------------------------------- the work

    def perform(
        self, works: Sequence[Work], record: Callable[[Trial], Trial], progress: Callable[[str], None] | None = None
    ) -> list[list[Trial]]:
        """See `flashcore.measure.cluster.Pool`.

        A worker that dies, hangs or loses its card leaves a record of kind ``worker``, and its task goes to another. A
        task that took `MOST_TRIES` workers with it is recorded as failed. So is one whose function raises.

        Raises
        ------
        ClusterLost
            The scheduler does not answer any more, or no worker was left for `EMPTY_S`.
        """
        with ThreadPoolExecutor(max(1, len(works))) as threads:
            # What comes before the tasks of one work, such as compiling, keeps no worker from the tasks of another.
            preparing = {n: threads.submit(work.prepare, False) for n, work in enumerate(works) if work.prepare}
            try:
                return self._all(Agenda(works, record), preparing, progress)
            finally:
                self._leave()
                for work in works:
                    if work.finish:
                        work.finish()

    def _all(
        self, agenda: Agenda, preparing: dict[int, Future], progress: Callable[[str], None] | None
    ) -> list[list[Trial]]:
        """Do all of it; `preparing` has by number of the works what has to end before the tasks of each."""
        self._last_seen = time.monotonic()
        while agenda.left:
            for call, seat, how in self._look():
                self._died(call, seat, how, agenda)
            for name, sentence in self._refused:
                agenda.record(Trial(kind="worker", status="unavailable", reason=sentence, data={"worker": name}))
            self._refused.clear()
            for job in self._out_of_reach(agenda.waiting):
                agenda.waiting.remove(job)
                agenda.settle(job, job.task.failed("its worker is gone"))
            for number in [n for n, done in preparing.items() if done.done()]:
                preparing.pop(number).result()  # what it raises ends it all
            self._assign(agenda.waiting, preparing, progress)
            for seat, call, told in self._hear(LOOK_S):
                job = call.job
                if told.ok:
                    agenda.settle(job, [_stamped(trial, call.place) for trial in told.value])
                elif told.crashed:
                    self._died(call, seat, told.how, agenda, reason=told.reason)
                    if call.by != "host" and seat.place is not None and not seat.barred:
                        seat.place = None  # its process is a new one, and the card may be gone
                        self._ask_who(seat, call.by)
                elif job.task.owed:
                    agenda.settle(job, [_stamped(trial, call.place) for trial in job.task.failed(told.reason)])
                else:
                    raise ClusterError(f"'{job.task.name}' failed on {call.place.label}: {told.reason}")
        for done in preparing.values():
            done.result()
        return agenda.results()

    def _assign(
        self, waiting: list[Job], preparing: Mapping[int, Future], progress: Callable[[str], None] | None
    ) -> None:
        """Give each worker that can take one the first task that may run there now, and again, until none can."""
        for spare in (False, True):  # a crew does what is the host's once nothing is left for its card
            able = self._idle()
            while able:
                given = []
                for seat in able:
                    job = next(
                        (j for j in waiting if j.work not in preparing and self._may(seat, j, spare=spare)), None
                    )
                    if job is None:
                        continue
                    task = job.task
                    content = packed(task.function, task.arguments, task.keywords)  # or an error, and nothing begun
                    waiting.remove(job)
                    if progress:
                        progress(task.name)
                    self._call(seat, content, task.limit_s, task.name, seat.room(task, spare=spare), job)
                    self._tell(seat, seat.doing)
                    given.append(seat)
                able = [seat for seat in given if seat.crew]

    def _out_of_reach(self, waiting: Sequence[Job]) -> list[Job]:
        """Tasks that one place alone may do, which is gone."""
        if any(seat.place is None and not seat.barred for seat in self._seats.values()):
            return []  # it may be the one that still has to say what it is
        there = {place.key for place in self.places}
        return [job for job in waiting if job.task.only is not None and job.task.only not in there]

    def _idle(self) -> list[Seat]:
        """Workers that may have room for a task."""
        idle = [
            s for s in self._seats.values()
            if s.place is not None and not s.barred and len(s.calls) < max(1, s.crew + s.hosts) and not s.timing
        ]  # fmt: skip
        return sorted(idle, key=lambda seat: (seat.place.node, seat.name))

    def _may(self, seat: Seat, job: Job, *, spare: bool = False) -> bool:
        """Whether a task may begin on a worker now: not where it died, if others work, and no timing beside others."""
        if job.task.only not in (None, seat.place.key) or seat.room(job.task, spare=spare) is None:
            return False
        others = [s for s in self._seats.values() if s is not seat and not s.barred]
        if seat.place.key in job.tried and any(s.place is None or s.place.key not in job.tried for s in others):
            return False  # one that still has to say what it is may be the one
        near = [s for s in self._seats.values() if s is not seat and seat.place.node in s.nodes]
        if seat.place.card is None:
            return not near or not (job.task.timing or any(s.timing for s in near))
        # One worker a card. Beside a timing another card of the node does one thing at a time: a crew takes all cores.
        if job.task.timing:
            return all(len(s.calls) == 1 for s in near)
        return not seat.calls or not any(s.timing for s in near)

    def _died(self, call: Call | None, seat: Seat, how: str, agenda: Agenda, *, reason: str = "") -> None:
        """Record what became of a worker, or of one process of it, and have its task done elsewhere, or give it up."""
        job, place = (call.job, call.place) if call else (None, seat.place)
        where = place.label if place else seat.name
        words = (reason[:1].lower() + reason[1:].rstrip(".")) or {
            "gone": "it left the scheduler, as a worker does that was killed",
            "hung": "it did not answer within the task's limit",
        }.get(how, how)
        doing = f" during '{job.task.name}'" if job else ""
        again = job is not None and len(job.deaths) + 1 < MOST_TRIES and job.task.only is None
        if job is not None:
            job.tried.add(place.key if place else seat.name)
            job.deaths.append(f"{where}: {words}")
        fate = "" if job is None else "; it is done elsewhere" if again else "; it is given up"
        data = {"worker": seat.name, "ended": how, "task": job.task.name if job else None, "redone": again}
        member = call is not None and how not in ("gone", "hung") and call.by != "one"
        told = f"{'A process of the' if member else 'The'} worker {where} was lost{doing}: {words}{fate}."
        trial = Trial(kind="worker", status="error", reason=told, data={k: v for k, v in data.items() if v is not None})
        agenda.record(_stamped(trial, place))
        self._tell(seat, seat.doing if member and seat.jobs else f"lost: {words}")
        if job is None:
            return
        if again:
            agenda.waiting.insert(0, job)
            return
        told = f"it took {len(job.deaths)} workers with it, the last on {job.deaths[-1]}"
        if job.task.only is not None:
            told = f"its worker was lost, {job.deaths[-1]}"
        trials = job.task.failed(told, ended=how)
        if not trials:
            raise ClusterError(f"'{job.task.name}' could not be done: {told}.")
        agenda.settle(job, [_stamped(trial, place) for trial in trials])

    # ---------------------------------------------------------------------------------------------- the workers

    def _look(self, *, at_once: bool = False) -> list[tuple[Call | None, Seat, str]]:
        """See which workers came, went or hang; gives those lost, once for each task that they were doing.

        Raises
        ------
        ClusterLost
            The scheduler does not answer, or there has been no worker for too long.
        """
        now = time.monotonic()
        if not at_once and now - self._looked < LOOK_S:
            return []
        self._looked = now
        there = self._there()
        lost: list[tuple[Call | None, Seat, str]] = []
        for address in [a for a in self._seats if a not in there]:
            gone = self._seats.pop(address)
            self._forget(gone.calls.values())
            lost += self._emptied(gone, "gone")
        for address, facts in there.items():
            if address not in self._seats:
                self._seats[address] = self._seated(address, facts)
        for seat in self._seats.values():
            if any(now - call.since > self._limit(seat, call) for call in seat.calls.values()):
                self._forget(seat.calls.values())
                lost += self._emptied(seat, "hung")
                seat.barred = seat.barred or "it hangs"
        if any(not seat.barred for seat in self._seats.values()):
            self._last_seen = now
        elif self._last_seen and now - self._last_seen > self._empty_s:
            raise ClusterLost(f"No worker is left at {self.address}; what was measured is kept.")
        return lost

    def _limit(self, seat: Seat, call: Call) -> float:
        """Seconds after which a call that was not answered says that its worker hangs.

        A process of a crew may have to start first, beside many others.
        """
        start_s = START_S if seat.crew or call.job is None else 0.0
        return start_s + (call.job.task.limit_s if call.job else 0.0) + self._grace_s

    @staticmethod
    def _emptied(seat: Seat, how: str) -> list[tuple[Call | None, Seat, str]]:
        """Take from a lost worker what it was doing; once nothing where it did nothing, and was no known loss."""
        doing = [call for call in seat.calls.values() if call.job is not None]
        seat.calls.clear()
        return [(call, seat, how) for call in doing] or ([] if seat.barred else [(None, seat, how)])

    def _there(self) -> dict[str, Mapping[str, Any]]:
        """The workers that the scheduler has, by address."""
        try:
            return self._asked("identity", n_workers=-1)["workers"]
        except Exception as error:  # whatever the connection dies of
            raise ClusterLost(
                f"The scheduler at {self.address} answers no more ({type(error).__name__}); what was measured is kept."
            ) from error

    def _seated(self, address: str, facts: Mapping[str, Any]) -> Seat:
        """A place in the books for a worker, which is asked what it is."""
        offered = facts.get("resources") or {}
        resource = next((name for name in RESOURCES if offered.get(name, 0) >= 1), "")
        crew, hosts = int(offered.get(CREW, 0)), int(offered.get(HOST, 0))
        seat = Seat(address, str(facts.get("name", address)), resource, crew, hosts if crew else 0)
        if not resource or facts.get("nthreads") != threads_of(offered):
            self._bar(seat, f"The worker {seat.name} has {facts.get('nthreads')} threads and the resources "
                            f"{dict(offered) or 'none'}, so Dask could put other work beside a timing; "
                            f"{self._fix}.")  # fmt: skip
        else:
            self._ask_who(seat)
        return seat

    def _ask_who(self, seat: Seat, by: By = "one") -> None:
        self._call(seat, packed(identify), START_S, "who are you", by)

    def _met(self, seat: Seat, told: Answer) -> None:
        """Take a worker in by what it says of itself, or refuse it."""
        if not told.ok:
            self._bar(seat, f"The worker {seat.name} cannot say what it is: {told.reason.rstrip('.')}; see that "
                            f"FlashCore {self._mine.version} runs there.")  # fmt: skip
            return
        place = place_of(told.value if isinstance(told.value, Mapping) else {}, seat.name)
        try:
            refuse_foreign(place, self._mine)
            others = [p for p in self.places if p.key == place.key]
            refuse_mixed([*others, place], place if self.mixed else self._mine)
        except ClusterError as error:
            self._bar(seat, str(error))
            return
        seat.place = place
        self._tell(seat, "ready")

    def _bar(self, seat: Seat, sentence: str) -> None:
        seat.barred = sentence
        self._refused.append((seat.name, sentence))

    # ---------------------------------------------------------------------------------------------- the wire

    def _call(
        self, seat: Seat, content: bytes, limit_s: float, name: str, by: By = "one", job: Job | None = None
    ) -> None:
        """Let a worker answer one call, and no other worker."""
        token, call = next(self._tokens), Call(job, seat.place, by, time.monotonic())
        seat.calls[token] = call
        alone = job is not None and job.task.timing and seat.crew > 0
        call.future = self.client.submit(
            answer, content, limit_s, by, seat.size(by), alone, key=f"{name} ({os.getpid()}-{token})",
            workers=[seat.address], allow_other_workers=False, pure=False, retries=0,
            resources={{"one": seat.resource, "crew": CREW, "host": HOST}[by]: 1},
        )  # fmt: skip
        call.future.add_done_callback(lambda future: self._answers.put((token, future)))

    def _hear(self, timeout_s: float) -> list[tuple[Seat, Call, Answer]]:
        """The answers that came, at least one unless the time is up; what a worker says of itself is taken here."""
        heard = []
        try:
            heard.append(self._answers.get(timeout=timeout_s))
            while True:
                heard.append(self._answers.get_nowait())
        except queue.Empty:
            pass
        found = []
        for token, future in heard:
            seat = next((s for s in self._seats.values() if token in s.calls), None)
            if seat is None or future.status not in ("finished", "error"):  # given up, or the connection is lost
                continue
            told = _read(future)
            call = seat.calls.pop(token)
            if call.job is None:
                self._met(seat, told)
            else:
                self._tell(seat, seat.doing, ended=True)
                found.append((seat, call, told))
        return found

    def _tell(self, seat: Seat, doing: str, *, ended: bool = False) -> None:
        """Let whoever watches know what a worker does now, and whether it ended a task; nothing hangs on it."""
        place = seat.place
        event = {"key": place.key if place else seat.name, "doing": doing, "ended": ended,
                 "label": place.label if place else f"worker {seat.name}"}  # fmt: skip
        try:
            self._asked("log_event", topic=TOPIC, msg=event)
        except Exception:  # the connection is lost, which the next look will say
            return

    def _leave(self) -> None:
        """Forget what is still on its way; the workers finish it for nobody."""
        for seat in self._seats.values():
            given_up = [token for token, call in seat.calls.items() if call.job is not None]
            if given_up:
                self._forget([seat.calls.pop(token) for token in given_up])
                seat.barred = seat.barred or "its last task was given up"

    def _forget(self, calls: Iterable[Call]) -> None:
        """Let Dask forget calls that nobody waits for; else it keeps one for a worker that is gone until we leave."""
        futures = [call.future for call in calls if call.future is not None]
        if futures:
            with contextlib.suppress(Exception):  # the connection is lost
                self.client.cancel(futures, force=True)


def _read(future: Any) -> Answer:
    """The answer that a future holds; one that Dask itself failed at is an answer too."""
    try:
        error = future.exception()
        if error is None:
            return future.result()
    except Exception as failure:
        error = failure
    lost = type(error).__name__ == "KilledWorker"
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return Answer(False, how="exit" if lost else "raised", reason=said, crashed=lost)


def _stamped(trial: Trial, place: Place | None) -> Trial:
    """The trial with where it was measured."""
    return trial if place is None else trial.model_copy(update={"card": place.key, "node": place.node})
