"""The app: sign in, vote, go back. Plain forms; a script adds the keys 1 to 4 and nothing that is needed."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from tersor.opening.leases import SECONDS, Lease, LeaseLostError, find, take, vote
from tersor.opening.page.views import CHOICES, Gallery, progress, voted
from tersor.opening.store import Store
from tersor.web.app import create_app
from tersor.web.pages import templates
from tersor.web.tokens import Signer

_COOKIE = "tersor_arena"
_STATIC = {"page.css": "text/css", "page.js": "text/javascript"}
#: What a form sent; empty where it sent nothing.
Field = Annotated[str, Form()]
#: Letters of a name at most.
_LONGEST = 60


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """How people vote.

    Args:
        votes: People wanted for each battle.
        annotators: Who may vote; anybody who gives a name if empty.
        key: What the address must hold to sign in; None where only this machine reaches the page.
        seconds: How long a battle is kept for the person who looks at it.
        hosts: See `tersor.web.app.create_app`.
        only: Battles that people are asked about, in their order; None asks about all.
    """

    votes: int = 1
    annotators: Sequence[str] = ()
    key: str | None = None
    seconds: float = SECONDS
    hosts: list[str] | None = None
    only: Sequence[str] | None = None
    signer: Signer = field(default_factory=Signer, repr=False)


class Visitor(NamedTuple):
    """Somebody's browser: a number of its own, and the name that it signed in with, if it has."""

    number: str
    name: str


def arena_page(store: Store, settings: PageSettings) -> Any:
    """The app that shows the battles of ``store`` to people."""
    app, gallery, environment = create_app(hosts=settings.hosts), Gallery(store), templates("tersor.opening.page")
    signer = settings.signer

    def visitor(request: Request) -> Visitor:
        text = signer.read("visitor", request.cookies.get(_COOKIE)) or ""
        number, _, name = text.partition(":")
        return Visitor(number or secrets.token_urlsafe(12), name)

    def page(who: Visitor, template: str, status: int = 200, **values: Any) -> Response:
        shared = {"csrf": signer.mark("form", who.number), "name": who.name}
        text = environment.get_template(template).render(**shared, **values)
        return signed(HTMLResponse(text, status_code=status), who)

    def signed(response: Response, who: Visitor) -> Response:
        token = signer.sign("visitor", f"{who.number}:{who.name}")
        response.set_cookie(_COOKIE, token, httponly=True, samesite="strict")
        return response

    def entrance(who: Visitor, key: str, status: int = 200, wrong: str = "") -> Response:
        return page(who, "sign_in.html", status, names=settings.annotators, key=key, wrong=wrong)

    def ours(who: Visitor, csrf: str) -> bool:
        return hmac.compare_digest(csrf.encode(), signer.mark("form", who.number).encode())

    def stale(who: Visitor) -> Response:
        return page(who, "note.html", 403, note="This form is too old. Nothing was recorded.")

    def own(who: Visitor, token: str) -> Lease | None:
        """The lease that a page names, if it is the visitor's."""
        lease = find(store, token)
        return lease if lease is not None and who.name and lease.annotator == who.name else None

    def battle_page(who: Visitor, lease: Lease) -> Response:
        counts, before = progress(store, who.name, settings.votes, settings.only), dict(voted(store, who.name))
        return page(
            who, "battle.html", view=gallery.view(lease), token=lease.token, choices=CHOICES, counts=counts,
            chosen=before.get(lease.token), back=bool(before) and next(iter(before)) != lease.token,
        )  # fmt: skip

    @app.get("/static/{name}")  # type: ignore[untyped-decorator]
    def static(name: str) -> Response:
        if name not in _STATIC:
            return Response(status_code=404)
        text = (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
        return Response(text, media_type=_STATIC[name])

    @app.get("/")  # type: ignore[untyped-decorator]
    def start(request: Request, key: str = "") -> Response:
        who = visitor(request)
        return RedirectResponse("/battle", 303) if who.name else entrance(who, key)

    @app.post("/sign-in")  # type: ignore[untyped-decorator]
    def sign_in(
        request: Request,
        csrf: Field = "",
        name: Field = "",
        key: Field = "",
    ) -> Response:
        who, name = visitor(request), " ".join(name.split())
        if not ours(who, csrf):
            return stale(who)
        if settings.key is not None and not hmac.compare_digest(key.encode(), settings.key.encode()):
            return entrance(who, key, 403, "Open the whole address that you were given: it ends with a key.")
        if not name or len(name) > _LONGEST or not name.isprintable():
            return entrance(who, key, 400, f"A name has 1 to {_LONGEST} letters.")
        if settings.annotators and name not in settings.annotators:
            return entrance(who, key, 403, "This name is not on the list of those who vote here.")
        return signed(RedirectResponse("/battle", 303), Visitor(who.number, name))

    @app.get("/battle")  # type: ignore[untyped-decorator]
    def next_battle(request: Request) -> Response:
        who = visitor(request)
        if not who.name:
            return RedirectResponse("/", 303)
        lease = take(store, who.name, votes=settings.votes, seconds=settings.seconds, only=settings.only)
        if lease is None:
            counts = progress(store, who.name, settings.votes, settings.only)
            return page(who, "done.html", counts=counts, waiting=counts[1] < counts[2])
        return battle_page(who, lease)

    @app.get("/battle/{token}")  # type: ignore[untyped-decorator]
    def former_battle(request: Request, token: str) -> Response:
        who = visitor(request)
        lease = own(who, token)
        if lease is None:
            return page(who, "note.html", 404, note="There is no such battle.")
        return battle_page(who, lease)

    @app.get("/picture/{token}/{number}")  # type: ignore[untyped-decorator]
    def picture(request: Request, token: str, number: int) -> Response:
        lease = own(visitor(request), token)
        found = None if lease is None else gallery.picture(lease, number)
        return Response(status_code=404) if found is None else Response(found, media_type="image/jpeg")

    @app.post("/vote")  # type: ignore[untyped-decorator]
    def cast(
        request: Request,
        csrf: Field = "",
        token: Field = "",
        choice: Field = "",
    ) -> Response:
        who = visitor(request)
        if not ours(who, csrf):
            return stale(who)
        if own(who, token) is None or choice not in CHOICES:
            return page(who, "note.html", 404, note="There is no such battle. Nothing was recorded.")
        try:
            vote(store, token, CHOICES[choice][0], votes=settings.votes)
        except LeaseLostError:
            note = "Your time for this battle was over, and somebody else has it now. Nothing was recorded."
            return page(who, "note.html", 409, note=note)
        return RedirectResponse("/battle", 303)

    @app.get("/back")  # type: ignore[untyped-decorator]
    def back(request: Request, before: str = "") -> Response:
        """To the vote before that on ``before``; to the last one if that battle has no vote yet."""
        who = visitor(request)
        tokens = [token for token, _ in voted(store, who.name)]
        earlier = tokens[: tokens.index(before)] if before in tokens else tokens
        return RedirectResponse(f"/battle/{earlier[-1]}" if earlier else "/battle", 303)

    return app
