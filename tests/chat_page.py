"""The chat page in Chromium: chat_page.py URL MODEL CHROMIUM. Any difference ends it with an exception."""

import re
import sys

from playwright.sync_api import sync_playwright

url, model, chromium = sys.argv[1:]

# An answer that goes on until it is stopped.
ENDLESS = """
const real = window.fetch;
window.fetch = (path, options) => {
  if (!path.includes("chat")) return real(path, options);
  window.asked = JSON.parse(options.body);
  const event = content => `data: ${JSON.stringify({ choices: [{ delta: { content }, finish_reason: null }] })}\\n\\n`;
  const body = new ReadableStream({
    start(controller) {
      controller.enqueue(new TextEncoder().encode(event("on ") + event("and <b>on</b>")));
      options.signal.addEventListener("abort", () => controller.error(new DOMException("stopped", "AbortError")));
    },
  });
  return Promise.resolve(new Response(body));
};
"""


def watched(context):
    """A page, and everything that it complains about or asks of others."""
    page, faults = context.new_page(), []
    page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith((url, "data:")) or faults.append(request.url))
    return page, faults


def done(page):
    page.wait_for_selector("#stop[disabled]")


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    context = browser.new_context()

    page, faults = watched(context)
    page.goto(url)
    page.wait_for_selector("#model:not(:empty)")
    assert page.inner_text("#model") == model
    page.click("#toggle")
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "20")
    page.fill("#seed", "3")
    answers = []
    for _ in range(2):
        page.fill("#say", "Hello")
        page.press("#say", "Enter")
        page.wait_for_selector(".assistant:not(:empty)")
        done(page)
        answers.append(page.text_content(".assistant"))
        assert re.search(r"\d+ tokens, [\d.]+ tokens/s, first after \d+ ms", page.inner_text("#speed"))
        assert page.text_content(".user") == "Hello"
        page.click("#clear")
        assert page.text_content("#talk") == ""
    assert answers[0] == answers[1], "the same seed, the same answer"
    page.fill("#max_tokens", "0")
    page.fill("#say", "Hello")
    page.click("#send")
    page.wait_for_selector(".error")
    assert "expected 1 to" in page.text_content(".error")
    faults = [fault for fault in faults if "status of 400" not in fault]
    assert faults == [], faults

    page, faults = watched(context)
    page.add_init_script(ENDLESS)
    page.goto(url)
    page.fill("#say", "Never end")
    page.click("#send")
    page.wait_for_selector(".assistant:not(:empty)")
    assert page.is_disabled("#send")
    page.click("#stop")
    done(page)
    assert page.text_content(".assistant") == "on and <b>on</b>" and page.is_enabled("#send")
    page.fill("#say", "Again")
    page.click("#send")
    page.wait_for_selector(".assistant >> nth=1")
    said = [(m["role"], m["content"]) for m in page.evaluate("window.asked.messages")]
    assert said == [("user", "Never end"), ("assistant", "on and <b>on</b>"), ("user", "Again")], said
    assert faults == [], faults
    browser.close()
