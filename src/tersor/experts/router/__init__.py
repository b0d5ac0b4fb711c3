"""Routing: which expert answers a request (ME-Switch, section 3.3)."""

from tersor._lazy import members

_MEMBERS = {
    "Route": "tersor.experts.router.routing",
    "Router": "tersor.experts.router.routing",
    "RouterConfig": "tersor.experts.router.config",
    "read_router_config": "tersor.experts.router.config",
    "user_turns": "tersor.experts.router.routing",
}
__getattr__, __dir__ = members(__name__, _MEMBERS)
