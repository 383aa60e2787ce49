"""The status page in a real Chromium: what it looks like, and that it keeps itself up to date.

The site is served on a socket of loopback, under a Content-Security-Policy that lets nothing in
but what the site itself serves; the browser's console must have nothing to complain of.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import django
import pytest
from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.handlers.wsgi import WSGIHandler
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By

from django_proxysql.core.faults import Fault
from django_proxysql.demo.site import HOST, serving
from django_proxysql.monitoring import views
from tests.browser import Browser, browser
from tests.servers.keeping import Keeper
from tests.status_site import ALONE, WITHOUT_ADMIN, Site, migrated, status_site

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated(tmp_path_factory.mktemp("status"))


@pytest.fixture(scope="module")
def chromium_session() -> Iterator[Keeper]:
    with Keeper() as keeper:
        yield keeper


def start(stack: ExitStack) -> Browser:
    return stack.enter_context(browser())


def set_back(used: Browser) -> None:
    used.driver.get("about:blank")
    # For the next one.
    assert used.complaints is not None


@pytest.fixture
def chromium(chromium_session: Keeper) -> Iterator[Browser]:
    """A browser that knows no site yet."""
    with chromium_session.use(start, set_back) as used:
        used.driver.delete_all_cookies()
        used.resize(1280)
        used.prefer("light")
        yield used


class Served:
    """A site, where it is served, and a browser that looks at it."""

    def __init__(self, site: Site, port: int, looker: Browser, path: str) -> None:
        self.site = site
        self.browser = looker
        self.root = f"http://{HOST}:{port}"
        self.url = f"{self.root}{path}"

    @classmethod
    @contextmanager
    def by(cls, tables: Path, looker: Browser, frame: str = "admin") -> Iterator[Served]:
        """Yield a site whose page is in the admin's frame, or in its own."""
        without = {"INSTALLED_APPS": WITHOUT_ADMIN, "ROOT_URLCONF": ALONE, "TEMPLATES": []}
        changed = without if frame == "own" else {}
        path = "/ops/db/" if frame == "own" else "/peers/"
        with ExitStack() as stack:
            site = stack.enter_context(status_site(tables, **changed))
            # It has the site's middleware from now on.
            port = stack.enter_context(serving(StaticFilesHandler(WSGIHandler())))
            yield cls(site, port, looker, path)

    def log_in(self) -> None:
        """As a superuser, by a cookie."""
        cookie = self.site.admin().cookies["sessionid"].value
        # A cookie is for the site that is shown.
        self.browser.driver.get(f"{self.url}status.css")
        self.browser.driver.add_cookie({"name": "sessionid", "value": cookie})

    def open(self) -> None:
        self.browser.driver.get(self.url)

    @property
    def text(self) -> str:
        """What is to be read on the page."""
        return str(self.browser.run("return document.body.innerText"))

    def wait_for(self, text: str) -> None:
        """Wait until that is to be read on the page."""
        self.browser.wait_for(lambda driver: text in self.text)

    def click(self, text: str) -> None:
        """Press the button of that text, or follow that link."""
        condition = f"[normalize-space()='{text}']"
        path = f"//button{condition} | //a{condition}"
        while True:
            try:
                self.browser.driver.find_element(By.XPATH, path).click()
                return
            except StaleElementReferenceException:
                # The page has just put another in its place.
                continue


@pytest.fixture
def served(tables: Path, chromium: Browser) -> Iterator[Served]:
    """A site with the admin."""
    with Served.by(tables, chromium) as made:
        yield made


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pages refresh themselves sooner than in five seconds."""
    monkeypatch.setattr(views, "REFRESH", 0.1)


#: What is narrower than what is in it; and text that does not stand out from what is behind it.
OVERFLOWING = """
const wide = document.documentElement.clientWidth;
return [...document.querySelectorAll("body *")].filter((e) => {
  const box = e.getBoundingClientRect();
  const seen = getComputedStyle(e).visibility !== "hidden" && box.width && box.height;
  // What is cut off on purpose, for screen readers; and what is not to be seen yet.
  const aside = ".peers-hidden, .visually-hidden, .skip-to-content-link, svg";
  const closed = "details:not([open]) > :not(summary)";
  return seen && !e.closest(`${aside}, ${closed}`) && (box.right > wide + 1 || box.left < -1);
}).map((e) => e.outerHTML.slice(0, 120));
"""
FAINT = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgb(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function brightness(colour) {
  const [r, g, b] = colour.slice(0, 3).map((part) => {
    const c = part / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
}
function contrast(one, other) {
  const [light, dark] = [brightness(one), brightness(other)].sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}
const texts = [...document.querySelectorAll("#peers *")].filter((e) => !e.closest("svg, details")
  && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
const faint = texts.map((e) => [e.outerHTML.slice(0, 80),
    contrast(rgb(getComputedStyle(e).color), behind(e))]).filter(([, c]) => c < 4.5);
const main = behind(document.getElementById("peers"));
for (const e of document.querySelectorAll("#peers text")) {
  const c = contrast(rgb(getComputedStyle(e).fill), main);
  if (c < 4.5) faint.push([e.outerHTML, c]);
}
for (const state of ["closed", "open", "half-open", "suspect", "drained"]) {
  const c = contrast(rgb(getComputedStyle(document.querySelector(`.fill-${state}`)).fill), main);
  if (c < 3) faint.push([state, c]);
}
return [texts.length, faint];
"""

#: Words that stand on more than one line, in the texts of the table. A hyphen may end a line.
BROKEN = r"""
const walker = document.createTreeWalker(
  document.querySelector(".peers-table"), NodeFilter.SHOW_TEXT);
const broken = [];
let words = 0;
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  if (node.parentElement.closest(".peers-hidden")) continue;
  for (const word of node.textContent.matchAll(/[^\s-]+/g)) {
    const range = document.createRange();
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    const lines = [...range.getClientRects()].map((box) => Math.round(box.top));
    words += lines.length > 0;
    if (new Set(lines).size > 1) broken.push(word[0]);
  }
}
return [words, broken];
"""

#: Of each card: its inner margins, and how far its first button is below the top of the line
#: "Actions" and right of the card's own edge; how high that line's own words are.
CARDS = """
return [...document.querySelectorAll(".peers-table tbody tr")].map((card) => {
  const looks = getComputedStyle(card);
  const actions = card.querySelector("td.actions");
  const [line, outer] = [actions.getBoundingClientRect(), card.getBoundingClientRect()];
  const button = actions.querySelector("button").getBoundingClientRect();
  const heading = getComputedStyle(actions, "::before");
  return {
    padding: ["Top", "Right", "Bottom", "Left"].map((s) => parseFloat(looks[`padding${s}`])),
    heading: heading.content,
    below: button.top - line.top - parseFloat(heading.height),
    right: button.left - outer.left,
    background: looks.backgroundColor,
  };
});
"""

#: As long as a driver's errors are.
LONG_ERROR = (
    'connection to server at "db-1.internal.example.com" (10.20.30.40), port 5432 failed: '
    "FATAL: the database system is starting up"
)


class TestLooks:
    @pytest.mark.parametrize("frame", ["admin", "own"])
    def test_wide_and_narrow_light_and_dark(
        self, tables: Path, chromium: Browser, frame: str
    ) -> None:
        """Nothing sticks out, everything can be read, and the console is silent."""
        with Served.by(tables, chromium, frame) as served:
            site = served.site
            served.log_in()
            site.fail("peer1")
            site.balancer.drain("peer2")
            backgrounds = set()
            for scheme in ("light", "dark"):
                chromium.prefer(scheme)
                for width in (1300, 800, 500, 360):
                    chromium.resize(width)
                    served.open()
                    assert "1 of 3 peers usable" in served.text
                    assert chromium.run(
                        "return document.documentElement.scrollWidth"
                    ) <= chromium.run("return document.documentElement.clientWidth")
                    assert chromium.run(OVERFLOWING) == []
                    texts, faint = chromium.run(FAINT)
                    assert texts > 20
                    assert faint == []
                    backgrounds.add(
                        chromium.run("return getComputedStyle(document.body).backgroundColor")
                    )
            # The admin has known dark since Django 3.2; the page is as the admin is.
            knows_dark = frame == "own" or django.VERSION >= (3, 2)
            assert len(backgrounds) == 1 + knows_dark
            assert [said for said in chromium.complaints if "/favicon.ico - " not in said] == []

    def test_no_width_breaks_a_word(self, served: Served) -> None:
        """Where columns are too narrow for the words of an error, each peer is a card."""
        served.log_in()
        peer = served.site.balancer.peers["peer1"]
        peer.breaker.trip(OSError(LONG_ERROR), Fault.UNREACHABLE)
        shown = {}
        for width in (1300, 1050, 1049, 900, 800, 500, 360):
            served.browser.resize(width)
            served.open()
            assert LONG_ERROR in served.text
            words, broken = served.browser.run(BROKEN)
            assert words > 30
            assert (width, broken) == (width, [])
            row = "return getComputedStyle(document.querySelector('.peers-table tr')).display"
            shown[width] = served.browser.run(row)
        assert [width for width in shown if shown[width] == "table-row"] == [1300, 1050]

    @pytest.mark.parametrize("width", [800, 500, 360])
    def test_cards_have_room_and_their_lines_headings(self, served: Served, width: int) -> None:
        """Where the table is no table any more, each line has its heading beside it."""
        served.log_in()
        served.site.fail("peer1")
        served.browser.resize(width)
        served.open()
        cards = served.browser.run(CARDS)
        assert len(cards) == 3
        for card in cards:
            assert min(card["padding"]) >= 8
            assert card["heading"] == '"Actions"'
            assert card["below"] >= 0
            assert 8 <= card["right"] <= 20
        # Every other line of the admin's tables is darker; every other card would be odd.
        assert len({card["background"] for card in cards}) == 1
        cell = "document.querySelector('td[data-label=\"Last error\"]')"
        before = served.browser.run(f"return getComputedStyle({cell}, '::before').content")
        assert before == '"Last error"'
        # Shown as something else, it is still a table to screen readers.
        assert served.browser.run(f"return {cell}.getAttribute('role')") == "cell"

    @pytest.mark.parametrize("width", [1300, 360])
    def test_no_database_no_page_but_the_next_step(self, served: Served, width: int) -> None:
        """It is unknown who asks."""
        served.log_in()
        served.site.fail("peer0", "peer1", "peer2")
        served.browser.resize(width)
        served.open()
        status = "return performance.getEntriesByType('navigation')[0].responseStatus"
        assert served.browser.run(status) == 503
        assert 'Run "manage.py peers" on a host of the site' in served.text
        assert "peer0" not in served.text
        assert served.browser.run(OVERFLOWING) == []


@pytest.mark.server
class TestWithoutJavaScript:
    def test_shows_everything_and_its_buttons_work(self, tables: Path) -> None:
        with browser(javascript=False) as looker, Served.by(tables, looker) as served:
            site = served.site
            served.log_in()
            site.fail("peer1")
            served.open()
            assert "2 of 3 peers usable" in served.text
            assert "unable to open database file" in served.text
            bars = looker.driver.find_elements(By.CSS_SELECTOR, ".bar-open")
            assert len(bars) == 1
            assert bars[0].size["width"] > 0
            served.click("Drain peer0")
            served.wait_for("You drained peer0 (load balancer default)")
            assert site.balancer.peers["peer0"].drained
            # Really without: no script has run.
            live = looker.driver.find_element(By.ID, "peers-live")
            assert looker.driver.find_element(By.ID, "peers").get_attribute("data-refresh") == "5"
            assert live.text == ""


@pytest.mark.usefixtures("soon")
class TestRefresh:
    def test_a_death_is_seen_without_loading_anew(self, served: Served) -> None:
        """What its user does on the page stays: where they are, what they have opened."""
        served.log_in()
        served.browser.resize(1280, 400)
        served.open()
        run = served.browser.run
        run("window.same = true; window.scrollTo(0, 150);")
        run("document.querySelector('details').open = true;")
        run("document.getElementById('drain-default-peer2').focus({preventScroll: true});")
        served.site.fail("peer1")
        served.wait_for("2 of 3 peers usable")
        assert "unable to open database file" in served.text
        assert run("return window.same") is True
        assert run("return window.scrollY") == 150
        assert run("return document.querySelector('details').open") is True
        assert run("return document.activeElement.id") == "drain-default-peer2"
        # A screen reader says it.
        live = "return document.getElementById('peers-live').textContent"
        assert run(live) == "Load balancer default: 2 of 3 peers usable"
        served.site.peers.restore("peer1")
        served.site.connect_to("peer1")
        served.wait_for("All 3 peers usable")
        served.browser.wait_for(lambda driver: "All 3" in run(live))
        assert run("return window.same") is True

    def test_text_that_is_marked_stays(self, served: Served) -> None:
        """An error that is being copied is not taken away; afterwards the page goes on."""
        served.site.fail("peer1")
        served.log_in()
        served.open()
        run = served.browser.run
        run("getSelection().selectAllChildren(document.querySelector('td.error'));")
        run("window.marked = document.querySelector('td.error');")
        run(
            "window.looks = 0; const get = window.getSelection.bind(window);"
            "window.getSelection = () => { window.looks += 1; return get(); };"
        )
        served.browser.wait_for(lambda driver: run("return window.looks") > 2)
        assert run("return window.marked.isConnected") is True
        run("getSelection().removeAllRanges();")
        served.browser.wait_for(lambda driver: not run("return window.marked.isConnected"))

    def test_text_that_is_marked_while_the_answer_is_under_way_stays(self, served: Served) -> None:
        served.site.fail("peer1")
        served.log_in()
        served.open()
        run = served.browser.run
        run(
            "const fetched = window.fetch.bind(window); window.answers = 0;"
            "window.fetch = async (...asked) => {"
            "  const answer = await fetched(...asked);"
            "  window.marked ??= document.querySelector('td.error');"
            "  getSelection().selectAllChildren(window.marked);"
            "  window.answers += 1;"
            "  return answer;"
            "};"
            "const get = window.getSelection.bind(window); window.looks = 0;"
            "window.getSelection = () => { window.looks += window.answers; return get(); };"
        )
        served.browser.wait_for(lambda driver: run("return window.looks") > 2)
        assert run("return [window.marked.isConnected, window.answers]") == [True, 1]

    def test_site_is_away(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """The page says since when it is old, and what is on it stays."""
        served.log_in()
        served.open()

        def broken() -> Any:
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(views, "status", broken)
            patch.setattr("django.core.signals.got_request_exception.send", lambda *a, **k: None)
            served.wait_for("Not refreshed since ")
        assert "the site answered 500" in served.text
        assert "All 3 peers usable" in served.text
        note = "return document.getElementById('peers-note').getAttribute('role')"
        assert served.browser.run(note) == "status"
        # When its user comes back to it, it tries at once.
        served.browser.run("document.dispatchEvent(new Event('visibilitychange'));")
        served.browser.wait_for(lambda driver: "Not refreshed" not in served.text)

    def test_logged_out_meanwhile(self, served: Served) -> None:
        """The login page is not put into the page: it says what to do, and stops."""
        served.log_in()
        served.open()
        served.browser.driver.delete_all_cookies()
        served.wait_for("you are no longer logged in as staff. Load the page again.")
        assert "All 3 peers usable" in served.text

    def test_pages_out_of_sight_ask_for_nothing(self, served: Served) -> None:
        """Until they are looked at again."""
        served.log_in()
        script = served.browser.driver.execute_cdp_cmd(
            "Page.addScriptToEvaluateOnNewDocument",
            {
                "source": "window.unseen = true; window.timers = 0;"
                "Object.defineProperty(document, 'hidden', {get: () => window.unseen});"
                "const start = window.setTimeout.bind(window);"
                "window.setTimeout = (...a) => { window.timers += 1; return start(...a); };"
            },
        )
        try:
            served.open()
            run = served.browser.run
            run("document.dispatchEvent(new Event('visibilitychange'));")
            assert run("return window.timers") == 0
            served.site.fail("peer1")
            assert "All 3 peers usable" in served.text
            run("window.unseen = false; document.dispatchEvent(new Event('visibilitychange'));")
            served.wait_for("2 of 3 peers usable")
            assert run("return window.timers") > 0
        finally:
            served.browser.driver.execute_cdp_cmd(
                "Page.removeScriptToEvaluateOnNewDocument", script
            )


class TestButtons:
    def test_from_the_login_to_the_last_peer(self, served: Served) -> None:
        """As an operator does it, who has no session yet."""
        from django.contrib.auth.models import User

        User.objects.create_superuser("root", "root@example.com", "sesame")
        served.open()
        driver = served.browser.driver
        assert driver.current_url.startswith(f"{served.root}/admin/login/")
        driver.find_element(By.NAME, "username").send_keys("root")
        password = driver.find_element(By.NAME, "password")
        password.send_keys("sesame")
        password.submit()
        served.wait_for("All 3 peers usable")
        assert driver.current_url == served.url

        for number, name in enumerate(("peer0", "peer1")):
            served.click(f"Drain {name}")
            served.wait_for(f"You drained {name} (load balancer default)")
            assert served.text.count("no new connections") >= number + 1
        served.click("Drain peer2")
        served.wait_for("Nothing was changed.")
        assert not served.site.balancer.peers["peer2"].drained
        served.click("Leave it in use")
        served.wait_for("1 of 3 peers usable")
        served.browser.wait_for(lambda driver: driver.current_url == served.url)
        served.click("Drain peer2")
        served.wait_for("Nothing was changed.")
        assert served.browser.run(OVERFLOWING) == []
        served.click("Take back peer0")
        served.wait_for("You took peer0 back into use")
        served.click("Drain peer2")
        served.wait_for("You drained peer2")
        served.click("Drain peer0")
        served.wait_for("Nothing was changed.")
        served.click("Drain peer0 all the same")
        served.wait_for("You drained peer0, the last that took connections")
        assert all(peer.drained for peer in served.site.balancer.peers.values())


@pytest.mark.server
def test_pictures_in_the_docs(tmp_path: Path) -> None:
    """The command that makes them does so; they are small."""
    command = [sys.executable, "-m", "tests.screenshots", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    made = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(made) == sorted(path.name for path in (ROOT / "docs" / "images").glob("*.png"))
    assert all(10_000 < size < 150_000 for size in made.values())
