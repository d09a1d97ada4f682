"""The page in a real Chromium, over a real server: `pytest -m browser`.

It needs Debian's chromium and chromium-driver; selenium is in the extra `test`. With
LDM_SCREENSHOTS=FOLDER it leaves pictures of the page there.
"""

import base64
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from serve_server import ASK, png, running, wait

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"
    ),
]
# no-sandbox: it does not start as root with one, as in containers. The rest leaves out what no test needs.
FLAGS = """headless=new no-sandbox no-zygote no-first-run hide-scrollbars disable-dev-shm-usage disable-gpu
disable-extensions disable-sync disable-background-networking disable-component-update disable-default-apps"""
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"> & <b>bold</b>"
# Drops a file on an element, as a hand does.
DROP = """
const [target, data, type, name] = arguments;
const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, {type}));
for (const kind of ["dragover", "drop"])
  target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer}));
"""


class Page:
    """The page, by the names of its fields and the ids of its parts."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self):
        self.driver.get(self.address)
        self.until(lambda: self.js("return document.documentElement.dataset.ready") == "true")

    def forget(self):
        """From another page of the server: this one saves itself when it is left."""
        self.driver.get(f"{self.address}healthz")
        self.js("localStorage.clear(); sessionStorage.clear()")

    def js(self, script, *values):
        return self.driver.execute_script(script, *values)

    def until(self, call, seconds=90):
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: call())

    def id(self, name):
        return self.driver.find_element(By.ID, name)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def field(self, name):
        return self.driver.find_element(By.NAME, name)

    def value(self, name):
        return self.field(name).get_property("value")

    def fill(self, **fields):
        for name, text in fields.items():
            self.field(name).clear()
            self.field(name).send_keys(str(text))

    def click(self, element):
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def drop(self, target, data, kind="image/png"):
        self.js(DROP, target, base64.b64encode(data).decode(), kind, "picture")

    def status(self):
        """Of the newest job."""
        return self.js("return document.querySelector('.job')?.dataset.status")

    def generate(self, **fields):
        self.fill(**{"width": 64, "height": 64, "num_inference_steps": 4, **fields})
        before = len(self.all(".job"))
        self.field("prompt").send_keys(Keys.CONTROL, Keys.ENTER)
        self.until(lambda: len(self.all(".job")) > before)

    def screenshot(self, name):
        if folder := os.environ.get("LDM_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for each in FLAGS.split():
        options.add_argument(f"--{each}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    made.set_window_size(1360, 900)
    yield made
    made.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve")) as made:
        model = made[1].shelf(made[1].shelf.default)
        # Fitted once, which takes its time.
        model.preview(torch.zeros(1, model.pipe.vae.latent_channels, 8, 8))
        yield made


@pytest.fixture
def page(driver, server):
    client, service = server
    for told in service.jobs(20):  # of a test that failed
        if ticket := service.ticket(told["id"]):
            service.queue.cancel(ticket)
            ticket.wait(60)
    made = Page(driver, str(client.base_url.join("/")))
    made.forget()
    made.open()
    yield made
    faults = [each["message"] for each in driver.get_log("browser") if each["level"] == "SEVERE"]
    # Answers that a test asks for, 400 and 404, are told of there too.
    assert [each for each in faults if "Failed to load resource" not in each] == []


def drawn(client):
    """The newest picture of the gallery."""
    return client.get("/api/pictures?limit=1").json()["pictures"][0]


def test_what_is_typed_is_drawn_with_a_preview_on_the_way(page, server):
    page.generate(prompt="a red house", negative_prompt="fog", seed=7, num_inference_steps=40)
    page.until(lambda: page.js("return document.querySelector('.job .preview').naturalWidth") > 0)
    assert "step" in page.id("state").text
    page.until(lambda: page.status() == "completed")
    image = page.until(lambda: page.all(".job .picture img"))[0]
    page.until(lambda: image.get_property("naturalWidth") == 64)
    assert page.id("live").text == "" or "completed" in page.id("live").get_property("textContent")
    told = drawn(server[0])["request"]
    asked = {"prompt": "a red house", "negative_prompt": "fog", "seeds": [7], "num_inference_steps": 40}
    assert {name: told[name] for name in asked} == asked
    page.until(lambda: page.all("#pictures .picture"))  # and it is in the gallery


def test_one_is_cancelled_and_those_that_wait_say_their_place(page):
    page.generate(prompt="slow", num_inference_steps=150, width=256, height=256, n=4)
    page.generate(prompt="next", n=1)
    page.until(lambda: "place 1" in page.all(".job .hint")[0].text)
    page.click(page.id("cancel"))  # the one that is drawn
    page.until(lambda: page.all(".job")[1].get_attribute("data-status") == "cancelled")
    page.until(lambda: page.status() == "completed")
    assert not page.id("cancel").is_enabled()


def test_after_a_reload_all_is_as_it_was(page):
    page.click(page.id("second").find_element(By.TAG_NAME, "summary"))
    page.click(page.id("hires"))
    page.fill(hires_scale=1.5)
    page.generate(prompt="a blue boat", seed=11, guidance_scale=3.5)
    page.until(lambda: page.status() == "completed")
    page.open()
    names = ("prompt", "seed", "guidance_scale", "width", "hires_scale")
    assert [page.value(name) for name in names] == ["a blue boat", "11", "3.5", "64", "1.5"]
    assert page.id("hires").is_selected()
    assert page.status() == "completed"  # this session's jobs are there too
    assert len(page.all(".job .picture")) == 1


def test_errors_stand_at_their_fields(page):
    page.fill(prompt="a boat", width=641, height=64)
    page.field("prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    fault = page.until(lambda: page.all("label small.fault"))[0]
    assert "multiple of 8" in fault.text
    assert page.field("width").get_attribute("aria-invalid") == "true"
    assert page.driver.switch_to.active_element == page.field("width")


def test_keys_weigh_words(page):
    page.fill(prompt="a red house")
    field = page.field("prompt")
    page.js("arguments[0].setSelectionRange(3, 3)", field)
    for keys, text in (
        (Keys.ARROW_UP, "a (red:1.1) house"),
        (Keys.ARROW_UP, "a (red:1.2) house"),
        (Keys.ARROW_DOWN, "a (red:1.1) house"),
        (Keys.ARROW_DOWN, "a red house"),
        (Keys.ARROW_DOWN, "a (red:0.9) house"),
    ):
        field.send_keys(Keys.CONTROL, keys)
        assert page.value("prompt") == text
    field.send_keys(Keys.CONTROL, "z")
    assert page.value("prompt") != "a (red:0.9) house"


def test_the_brush_paints_what_is_drawn_anew(page, server):
    client, service = server
    page.drop(page.id("zone"), png((64, 64), colour=(200, 40, 40)))
    page.until(lambda: page.id("stage").is_displayed())
    canvas = page.id("mask")
    page.js("arguments[0].scrollIntoView({block: 'center'})", canvas)
    width = canvas.size["width"]
    move = ActionChains(page.driver).move_to_element_with_offset(canvas, -width // 4, 0)
    move.click_and_hold().move_by_offset(0, width // 8).release().perform()
    page.until(lambda: not page.id("mask-fields").get_property("disabled"))
    page.screenshot("inpaint")
    stroke = painted(page)
    page.click(page.id("invert"))
    assert abs(painted(page).astype(int) + stroke - 255).max() <= 2  # edges are half transparent
    page.click(page.id("undo"))
    assert np.array_equal(painted(page), stroke)
    page.click(page.id("clear"))
    page.until(lambda: page.id("mask-fields").get_property("disabled"))
    page.click(page.id("undo"))
    page.until(lambda: not page.id("mask-fields").get_property("disabled"))
    page.open()  # the mask outlives a reload
    page.until(lambda: page.id("stage").is_displayed())
    assert abs(painted(page).astype(int) - stroke).max() < 8
    page.generate(prompt="a house", seed=3, num_inference_steps=6, mask_blur=0)
    page.until(lambda: page.status() in ("completed", "failed"))
    assert page.status() == "completed", page.all(".job .fault")[0].text
    picture = np.asarray(Image.open(service.path_of(drawn(client)["id"])), int)
    changed = abs(picture - (200, 40, 40)).max(-1) > 2
    assert not changed[:, 40:].any()  # the stroke lies in the left half
    assert changed[32:36, 14:18].any()


def painted(page):
    """The mask's paint, [H, W] of 0 to 255."""
    script = """const mask = document.getElementById("mask");
    return [...mask.getContext("2d").getImageData(0, 0, mask.width, mask.height).data];"""
    return np.asarray(page.js(script), np.uint8).reshape(64, 64, 4)[..., 3]


def test_a_dropped_picture_restores_its_settings(page, server, tmp_path):
    client, service = server
    fields = {**ASK, "prompt": "a green tree", "seed": 9, "guidance_scale": 2.5, "eta": 0.5}
    fields["sampler"] = "ddim"
    told = wait(client, client.post("/api/jobs", json=fields).json()["id"])
    assert told["status"] == "completed", told["error"]
    page.drop(page.id("gallery"), service.path_of(told["pictures"][0]).read_bytes())
    page.until(lambda: page.value("prompt") == "a green tree")
    names = ("seed", "width", "guidance_scale", "num_inference_steps", "sampler", "n")
    assert [page.value(name) for name in names] == ["9", "64", "2.5", "2", "ddim", "1"]
    # What has no field goes along: the same picture is drawn again.
    assert '"eta": 0.5' in page.id("extra").get_property("textContent")
    page.click(page.id("generate"))
    page.until(lambda: page.status() in ("completed", "failed"))
    again = drawn(client)
    assert again["id"] != told["pictures"][0]
    first, second = (
        np.asarray(Image.open(service.path_of(name))) for name in (told["pictures"][0], again["id"])
    )
    assert np.array_equal(first, second)


def test_what_a_strangers_picture_says_is_text(page, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{HOSTILE}\nSteps: 3, Sampler: Euler, CFG scale: 4, Seed: 5, Size: 64x64")
    Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=info)
    page.drop(page.id("request"), (tmp_path / "theirs.png").read_bytes())
    page.until(lambda: page.value("prompt") == HOSTILE)
    assert [page.value(name) for name in ("seed", "sampler")] == ["5", "euler"]
    page.click(page.id("generate"))
    page.until(lambda: page.status() == "completed")
    assert page.all(".job .bar p")[0].text == HOSTILE
    page.click(page.until(lambda: page.all(".job .picture"))[0])
    page.until(lambda: HOSTILE in page.id("metadata").text)
    assert page.driver.title == "ldm"
    assert page.all("main b, dialog b, img[src=x]") == []


def test_the_gallery_goes_on_as_one_scrolls_and_its_pictures_can_be_sent_and_deleted(page, server):
    client, service = server
    plain = Image.new("RGB", (64, 64))
    for k in range(90):
        plain.save(service.store.pictures / f"old-{k:03}.png")
    service.store.rebuild()
    page.open()
    page.until(lambda: len(page.all("#pictures .picture")) >= 40)
    whole = service.store.count
    for _ in range(10):
        page.js("window.scrollTo(0, document.body.scrollHeight)")
        time.sleep(0.1)
        if len(page.all("#pictures .picture")) == whole:
            break
    page.until(lambda: len(page.all("#pictures .picture")) == whole)
    names = page.js("return [...document.querySelectorAll('#pictures .picture')].map(e => e.dataset.picture)")
    assert len(set(names)) == whole
    image = page.all("#pictures img")[0]
    assert image.get_attribute("src").endswith(f"/{names[0]}/thumbnail")
    assert image.get_attribute("loading") == "lazy"
    page.until(lambda: page.js("return document.querySelector('#pictures img').naturalWidth") == 64)

    page.js("document.querySelector('#pictures .picture').click()")
    page.until(lambda: page.id("viewer").is_displayed())
    page.click(page.all("[data-do=inpaint]")[0])
    page.until(lambda: page.id("stage").is_displayed())
    assert page.driver.switch_to.active_element == page.id("mask")
    page.js("document.querySelector('#pictures .picture').click()")
    page.until(lambda: page.id("viewer").is_displayed())
    for _ in range(2):  # the first press asks
        page.click(page.all("[data-do=delete]")[0])
    page.until(lambda: len(page.all("#pictures .picture")) == whole - 1)
    assert client.get(f"/api/pictures/{names[0]}").status_code == 404


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1360])
def test_nothing_is_wider_than_the_window(page, width, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.js("for (const each of document.querySelectorAll('details')) each.open = true")
        page.generate(prompt=f"{'unbreakable' * 30} a red house by the sea", num_inference_steps=1)
        page.until(lambda: page.status() == "completed")
        for part in ("generate", "gallery"):
            page.js("arguments[0].scrollIntoView()", page.id(part))
            page.screenshot(f"{width}-{scheme}-{part}")
            assert page.js("return document.documentElement.scrollWidth") <= width
        page.click(page.until(lambda: page.all(".job .picture"))[0])
        page.until(lambda: page.id("viewer").is_displayed())
        page.screenshot(f"{width}-{scheme}-viewer")
        assert page.js("return document.getElementById('viewer').scrollWidth") <= width
        dark = page.js("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, dark[4:-1].split(","))) < 200) == (scheme == "dark")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_every_control_has_a_name_and_can_be_reached(page):
    page.js("for (const each of document.querySelectorAll('details')) each.open = true")
    controls = page.all("main button, main input, main select, main textarea, main canvas, main progress")
    assert len(controls) > 30
    for each in controls:
        if each.is_displayed():
            assert each.accessible_name, each.get_attribute("outerHTML")
    reached = set()
    page.field("prompt").click()
    for _ in range(40):
        reached.add(page.js("return document.activeElement.name || document.activeElement.id"))
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
    assert {"prompt", "generate", "model", "swap", "dice", "n", "file", "hires", "search"} <= reached
