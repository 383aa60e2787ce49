/* Refreshes the status page: fetches it again and puts its main part in place of the old one.
   Without JavaScript the page is as it was when it was loaded. */
(function () {
  "use strict";

  var part = document.getElementById("peers");
  var note = document.getElementById("peers-note");
  var live = document.getElementById("peers-live");
  var seconds = part ? Number(part.dataset.refresh) : 0;
  if (!seconds || !window.fetch || !window.AbortController) {
    return;
  }

  var SLOWER = 30;
  var PATIENCE = 20;
  var timer = null;
  var underWay = false;
  var over = false;
  var lastGood = new Date();

  function plan(after) {
    window.clearTimeout(timer);
    // A hidden page asks for nothing.
    if (!over && !document.hidden) {
      timer = window.setTimeout(refresh, after * 1000);
    }
  }

  function say(text) {
    if (note.textContent !== text) {
      note.textContent = text;
    }
    note.hidden = !text;
  }

  function headlines(within) {
    return Array.prototype.map
      .call(within.querySelectorAll(".peers-balancer"), function (balancer) {
        return (balancer.querySelector("h2") || balancer).textContent + ": " +
          (balancer.querySelector(".peers-headline, .peers-alert") || balancer).textContent;
      })
      .join(". ");
  }

  function isBeingRead() {
    var selection = window.getSelection();
    return !!selection && !selection.isCollapsed && part.contains(selection.anchorNode);
  }

  function replaceBy(fresh) {
    var before = headlines(part);
    var focused = part.contains(document.activeElement) ? document.activeElement.id : "";
    var opened = Array.prototype.map.call(
      part.querySelectorAll("details[open]"), function (details) { return details.id; });
    part.replaceChildren.apply(part, Array.prototype.slice.call(fresh.childNodes));
    opened.forEach(function (id) {
      var details = document.getElementById(id);
      if (details) { details.open = true; }
    });
    var again = focused && document.getElementById(focused);
    if (again) { again.focus({ preventScroll: true }); }
    // A screen reader reads it out only when it has changed.
    var after = headlines(part);
    if (after !== before) { live.textContent = after; }
  }

  function refresh() {
    if (underWay || over) {
      return;
    }
    if (isBeingRead()) {
      plan(seconds);
      return;
    }
    underWay = true;
    var abort = new AbortController();
    var patience = window.setTimeout(function () { abort.abort(); }, PATIENCE * 1000);
    window.fetch(part.dataset.url, {
      credentials: "same-origin", cache: "no-store", signal: abort.signal
    }).then(function (response) {
      if (response.status >= 500) {
        throw new Error("the site answered " + response.status);
      }
      return response.text();
    }).then(function (text) {
      var fresh = new DOMParser().parseFromString(text, "text/html").getElementById("peers");
      if (over) {
        return;
      }
      if (!fresh) {
        over = true;
        say("Not refreshed any more: you are no longer logged in as staff. Load the page again.");
        return;
      }
      // Text may have been marked since the answer was asked for.
      if (!isBeingRead()) {
        replaceBy(fresh);
        lastGood = new Date();
      }
      say("");
      plan(seconds);
    }).catch(function (error) {
      var why = error.name === "AbortError" ? "no answer in " + PATIENCE + " seconds" : error.message;
      say("Not refreshed since " + lastGood.toLocaleTimeString() + " (" + why + "). " +
        "What is below may be old; the site is asked again every " + SLOWER + " seconds.");
      plan(SLOWER);
    }).then(function () {
      window.clearTimeout(patience);
      underWay = false;
    });
  }

  document.addEventListener("visibilitychange", function () {
    if (document.hidden) {
      window.clearTimeout(timer);
    } else {
      refresh();
    }
  });
  // A button was pressed: the answer is a new page.
  document.addEventListener("submit", function () {
    over = true;
    window.clearTimeout(timer);
  });
  // … but for one that the browser has kept and goes back to.
  window.addEventListener("pageshow", function (event) {
    if (event.persisted) {
      over = false;
      refresh();
    }
  });

  plan(seconds);
})();
