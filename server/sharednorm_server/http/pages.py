"""The pages for people: what layers there are, who uses them, and what one of them has learned. They change nothing.

Whoever may read a namespace sees it; of the others they see that they may not. Everything comes from this process:
nothing is fetched from elsewhere, and there is no script.
"""

from __future__ import annotations

import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import jinja2

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.limits import DEFAULT_NAMESPACE
from sharednorm.core.validation import check_namespace
from sharednorm.errors import LayerNotFound
from sharednorm_server.auth.tokens import TokenFile
from sharednorm_server.groups.coordinator import Synchronizer
from sharednorm_server.http.charts import channels_chart, drift_chart
from sharednorm_server.http.health import Health, health_of
from sharednorm_server.http.history import History, Sample
from sharednorm_server.http.server import Response, Visitor, WebServer
from sharednorm_server.layers.service import LayerService
from sharednorm_server.observability.metrics import CONTENT_TYPE, Metrics
from sharednorm_server.store.base import LayerKey, LayerRecord

_HTML = "text/html; charset=utf-8"
_PAGE_SIZE = 100
_VECTORS = ("mean", "var", "scale", "bias")
_TITLES = {"mean": "Running mean", "var": "Running variance", "scale": "Scale", "bias": "Bias"}
_REFRESH_SECONDS = 10


@dataclass(frozen=True)
class _Row:
    # A layer in the list.
    record: LayerRecord
    health: Health
    rate: float | None  # steps a second

    @property
    def mode(self) -> str:
        state = self.record.state
        if not state.initialized:
            return "empty"
        return ("train" if self.record.train else "eval") + (", frozen" if state.stats_frozen else "")


class Pages:
    """The pages of a server, and what its watchers ask for.

    Args:
        service: Its layers.
        groups: Its groups.
        metrics: Its metrics.
        peers: Who has each of its direct connections.
        callers: How many connections of each host have called by gRPC within the last minute.
        why_not_ready: Why it takes no calls; "" if it does.
    """

    def __init__(
        self,
        service: LayerService,
        groups: Synchronizer,
        metrics: Metrics,
        peers: Callable[[], list[str]],
        callers: Callable[[], Counter[str]],
        why_not_ready: Callable[[], str],
    ) -> None:
        self._service, self._groups, self._metrics = service, groups, metrics
        self._peers, self._callers = peers, callers
        self._why_not_ready = why_not_ready
        self._history = History(service.alive)
        self._began = time.time()
        self._web: WebServer | None = None
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("sharednorm_server.http"), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        environment.filters |= {"number": _number, "size": format_amount}
        self._list, self._layer = environment.get_template("list.html"), environment.get_template("layer.html")

    @property
    def address(self) -> str | None:
        """Where they are; None: nowhere yet."""
        return None if self._web is None else self._web.address

    def serve(self, listen: str, tokens: TokenFile | None, context: Callable[[], ssl.SSLContext] | None) -> None:
        """Have them answered; raises what `WebServer` raises."""
        routes = {
            "/": self.list_page, "/layer": self.layer_page, "/metrics": self.metrics_text,
            "/healthz": self.health_text, "/readyz": self.ready_text,
        }  # fmt: skip
        self._web = WebServer(listen, routes, tokens, context)
        self._history.start()

    def close(self) -> None:
        """Answer no more."""
        self._history.close()
        if self._web is not None:
            self._web.close()

    # --- For programs -----------------------------------------------------------------------------------

    def metrics_text(self, visitor: Visitor, query: Mapping[str, str]) -> Response:
        """Return the metrics."""
        del query
        visitor.require_token()
        return Response(self._metrics.text(), CONTENT_TYPE)

    def health_text(self, visitor: Visitor, query: Mapping[str, str]) -> Response:
        """Say that the process lives."""
        del visitor, query
        return Response(b"ok\n")

    def ready_text(self, visitor: Visitor, query: Mapping[str, str]) -> Response:
        """Say whether calls are taken."""
        del visitor, query
        why = self._why_not_ready()
        return Response(f"{why}\n".encode(), status=503) if why else Response(b"ok\n")

    # --- For people -------------------------------------------------------------------------------------

    def list_page(self, visitor: Visitor, query: Mapping[str, str]) -> Response:
        """Return the page of a namespace's layers, and of the groups in it."""
        visitor.require_token()
        spaces = [(name, count) for name, count in self._service.list_namespaces() if visitor.may_read(name)]
        names = [name for name, _ in spaces]
        first = names[0] if names and DEFAULT_NAMESPACE not in names else DEFAULT_NAMESPACE
        namespace = check_namespace(query.get("namespace") or first)
        visitor.require(namespace)
        records, following = self._service.list_layers(namespace, _PAGE_SIZE, query.get("page", ""))
        groups = [group for group in self._groups.groups() if group.key.namespace == namespace]
        return self._html(
            self._list,
            query,
            namespace=namespace,
            spaces=spaces,
            rows=[_Row(record, health_of(record), self._history.rate(record.key)) for record in records],
            following=following,
            groups=groups,
            figures=self._service.figures,
            peers=sorted(Counter(self._peers()).items()),
            callers=sorted(self._callers().items()),
            running=self._metrics.in_progress,
            uptime=_duration(time.time() - self._began),
        )

    def layer_page(self, visitor: Visitor, query: Mapping[str, str]) -> Response:
        """Return the page of one layer."""
        namespace, name = query.get("namespace", DEFAULT_NAMESPACE), query.get("name", "")
        visitor.require(namespace)
        if not name:
            raise LayerNotFound("the page is of no layer (expected: ?name=...)")
        record = self._service.get_layer(LayerKey(namespace, name, domain=query.get("domain", "")))
        health = health_of(record)
        marked = [*health.dead, *health.exploding]
        charts = []
        if record.state.initialized:
            for vector in _VECTORS:
                values = getattr(record.state, vector)
                chart = channels_chart(values, marked, _TITLES[vector], logarithmic=vector == "var")
                charts.append((_TITLES[vector], chart))
        samples = self._history.samples(record.key)
        domains = [domain for domain, _ in self._service.list_domains(record.key)]
        return self._html(
            self._layer,
            query,
            row=_Row(record, health, self._history.rate(record.key)),
            facts=_facts(record.config),
            charts=charts,
            drift=_drift(samples),
            domains=domains,
            snapshots=self._service.list_snapshots(record.key)[-20:][::-1],
            moment=lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)),
        )

    def _html(self, template: jinja2.Template, query: Mapping[str, str], **values: Any) -> Response:
        others = {name: value for name, value in query.items() if name != "every"}
        text = template.render(
            info=self._service.info,
            address=self.address,
            refresh=0 if query.get("every") == "never" else _REFRESH_SECONDS,
            stay="?" + urlencode({**others, "every": "never"}),
            again="?" + urlencode(others),
            now=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            **values,
        )
        return Response(text.encode("utf-8", "backslashreplace"), _HTML)


def _drift(samples: list[Sample]) -> list[tuple[str, str]]:
    if len(samples) < 2:
        return []
    return [
        (_TITLES[name], drift_chart(samples, name, _TITLES[name], logarithmic=name == "var"))
        for name in ("mean", "var")
    ]


def _facts(config: LayerConfig) -> list[tuple[str, str]]:
    return [
        ("kind", config.kind.label),
        ("maps", str(config.maps)),
        ("epsilon", f"{config.epsilon:g}"),
        ("averaging", f"{config.averaging.value}, f = max({config.init_factor:g} / n, {config.min_factor:g})"),
        ("affine", "yes" if config.affine else "no: scale 1 and bias 0, fixed"),
        ("NaN, infinity", {"refuse": "refused", "allow": "allowed"}[config.nonfinite.value]),
    ]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def format_amount(size: int) -> str:
    """Return a number of bytes as people read it."""
    for unit, of in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= of:
            return f"{size / of:.3g} {unit}"
    return f"{size} B"


def _duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{count} {unit}" for count, unit in parts if count][:2]
    return " ".join(shown) or "0 s"
