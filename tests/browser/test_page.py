"""The page in Chromium: trains as Python does, keeps what it learnt, explains drawings, works offline, names faults."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from convgrad_export.training.comparison import LossCurves, train_with_pytorch
from convgrad_export.training.digits import load_digits
from convgrad_export.training.losses import resolve_loss

from .conftest import CHROMIUM, WITH_WEBGPU, export_assets
from .node_runner import HERE, needs_node, needs_web, run_script

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
COMPARED, COMPARED_WEBGPU = 100, 20  # SwiftShader's WebGPU takes half a second a step
SECONDS = 1000.0  # milliseconds, Playwright's unit


def ready(page: Any, address: str) -> Any:
    page.goto(address)
    page.wait_for_selector("#start:enabled", timeout=60 * SECONDS)
    return page


def train(page: Any, steps: int) -> list[float]:
    """Train up to a step and wait until it is saved; all losses so far."""
    page.evaluate("steps => convgrad.train(steps)", steps)
    page.wait_for_selector(f"body[data-saved='{steps}']", timeout=120 * SECONDS)
    return page.evaluate("convgrad.losses")


def draw(page: Any, strokes: list[list[tuple[float, float]]]) -> None:
    """Draw with the mouse; points in board sides."""
    box = page.locator("#board").bounding_box()
    for stroke in strokes:
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=4)
        page.mouse.up()


def circle(x: float, y: float, radius_x: float, radius_y: float) -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * math.pi, 24)
    return [(x + radius_x * math.sin(a), y - radius_y * math.cos(a)) for a in angles]


SEVEN = [[(0.25, 0.2), (0.75, 0.2), (0.45, 0.85)]]
ZERO = [circle(0.5, 0.5, 0.22, 0.33)]


@pytest.fixture(scope="module")
def curves() -> Any:
    """Judges losses of the first steps: PyTorch's own on the same batches, float32 and float64, set the bound."""
    script = export_assets()
    run = script.Run()
    data = load_digits()
    first = script.batches(data, run)[:COMPARED]
    make = lambda parameters: script.optimizer(parameters, run)  # noqa: E731
    loss = resolve_loss("cross_entropy")
    losses = {
        dtype: np.array(train_with_pytorch(script.network(), loss, make, first, seed=run.seed, dtype=dtype)[0])
        for dtype in (torch.float32, torch.float64)
    }
    return lambda got: LossCurves(
        np.array(got[:COMPARED]), *(losses[dtype][: len(got)] for dtype in (torch.float32, torch.float64))
    )


def test_the_page_trains_as_python_does(context: Any, url: str, assets: Path, curves: Any) -> None:
    page = ready(context.new_page(), url)
    assert page.locator("body").get_attribute("data-provider") == "wasm"
    losses = train(page, 880)
    assert len(losses) == 880
    judged = curves(losses)
    assert judged.within, judged.ratios.max()
    reference = np.frombuffer((assets / "reference_loss.bin").read_bytes(), "<f4")
    np.testing.assert_allclose(losses[:COMPARED], reference[:COMPARED], rtol=1e-3)
    assert np.mean(losses[-44:]) < 0.1 * np.mean(losses[:44])
    accuracy = float(page.locator("#accuracy").inner_text().rstrip("%"))
    assert accuracy > 97.0
    assert page.locator("#alert").is_hidden()


def test_a_reload_keeps_the_training(context: Any, url: str) -> None:
    page = ready(context.new_page(), url)
    before = train(page, 60)
    ready(page, url)
    assert "step 60" in page.locator("#saved").inner_text()
    assert page.evaluate("convgrad.losses") == before
    resumed = train(page, 100)
    other = ready(context.browser.new_context().new_page(), url)
    assert resumed == train(other, 100)  # parameters, optimizer and batches go on as if nothing had happened
    other.context.close()


def test_reset_goes_back_to_the_initial_state(context: Any, url: str) -> None:
    page = ready(context.new_page(), url)
    first = train(page, 20)
    page.click("#reset")
    page.wait_for_function("convgrad.losses.length === 0")
    page.evaluate("delete document.body.dataset.saved")
    assert train(page, 20) == first


@pytest.mark.parametrize(("digit", "strokes"), [(7, SEVEN), (0, ZERO)], ids=["seven", "zero"])
def test_a_drawn_digit_is_recognised_and_explained(
    digit: int, strokes: list[list[tuple[float, float]]], context: Any, url: str
) -> None:
    page = ready(context.new_page(), url)
    train(page, 220)
    draw(page, strokes)
    page.wait_for_selector("body[data-map='shown']", timeout=20 * SECONDS)
    page.wait_for_function(f"document.querySelector('#answer strong')?.textContent === '{digit}'", timeout=20 * SECONDS)
    coloured = """() => {
        const c = document.querySelector("#overlay");
        const { data } = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        return data.filter((v, i) => i % 4 === 3 && v > 80).length;
    }"""
    assert 0.02 * 512 * 512 < page.evaluate(coloured) < 0.98 * 512 * 512
    page.check("input[name=layer][value='']")
    assert page.evaluate(coloured) == 0
    page.check("input[name=layer][value='0']")
    assert page.locator("body").get_attribute("data-map") == "shown"
    page.locator("#digits button").nth((digit + 1) % 10).click()  # the evidence for another digit
    page.wait_for_function(f"document.querySelectorAll('#digits button')[{(digit + 1) % 10}].ariaPressed === 'true'")


def test_it_asks_no_other_host(browser: Any, url: str) -> None:
    context = browser.new_context()
    asked: list[str] = []

    def only_loopback(route: Any) -> None:
        asked.append(route.request.url)
        route.continue_() if route.request.url.startswith(url) else route.abort()

    context.route("**/*", only_loopback)
    page = ready(context.new_page(), url)
    train(page, 10)
    page.click("#sample")
    page.wait_for_selector("body[data-map]")
    assert len(asked) > 5
    assert [address for address in asked if not address.startswith(url)] == []
    context.close()


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("step.onnx", b"this is no model" * 100, "step.onnx is damaged"),
        ("step.onnx", None, "step.onnx is missing"),
        ("manifest.json", None, "manifest.json is missing"),
    ],
    ids=["damaged", "missing", "no manifest"],
)
def test_a_bad_file_is_named_to_the_user(name: str, body: bytes | None, message: str, context: Any, url: str) -> None:
    answer = {"status": 404} if body is None else {"status": 200, "body": body}
    context.route(f"**/assets/{name}", lambda route: route.fulfill(**answer))
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#alert.error:visible", timeout=60 * SECONDS)
    assert message in page.locator("#alert").inner_text()
    assert page.locator("#start").is_disabled()


def test_a_model_that_onnxruntime_refuses_is_named(context: Any, url: str, assets: Path) -> None:
    bad = b"this is no model" * 100
    manifest = json.loads((assets / "manifest.json").read_text())
    manifest["files"]["step.onnx"] = {"bytes": len(bad), "sha256": export_assets().hashlib.sha256(bad).hexdigest()}
    context.route("**/assets/step.onnx", lambda route: route.fulfill(body=bad))
    context.route("**/assets/manifest.json", lambda route: route.fulfill(body=json.dumps(manifest)))
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#alert.error:visible", timeout=60 * SECONDS)
    assert "onnxruntime-web cannot load step.onnx" in page.locator("#alert").inner_text()


def test_webgpu_trains_as_python_does(playwright: Any, url: str, curves: Any) -> None:
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=WITH_WEBGPU)
    page = ready(chromium.new_page(), url)
    said = page.locator("#backend").inner_text()
    if "no adapter" in said or "no WebGPU" in said:
        chromium.close()
        pytest.skip(f"no WebGPU in this Chromium: {said}")
    page.select_option("#provider", "webgpu")
    page.wait_for_selector("#start:enabled", timeout=60 * SECONDS)
    assert page.locator("body").get_attribute("data-provider") == "webgpu"
    losses = train(page, COMPARED_WEBGPU)
    assert len(losses) == COMPARED_WEBGPU
    judged = curves(losses)
    assert judged.within, judged.ratios.max()
    chromium.close()


@pytest.mark.parametrize("runtime", [pytest.param("node", marks=needs_node), pytest.param("web", marks=needs_web)])
def test_the_same_step_trains_in_node(runtime: str, assets: Path, tmp_path: Path, curves: Any) -> None:
    output = run_script(HERE / "train_digits.mjs", runtime, assets, COMPARED, tmp_path / "trained.safetensors")
    losses = json.loads(output)
    judged = curves(losses)
    assert judged.within, judged.ratios.max()
    trained, initial = load_file(tmp_path / "trained.safetensors"), load_file(assets / "step.checkpoint.safetensors")
    assert set(trained) == set(initial)
    assert int(trained["step"]) == COMPARED
    assert not np.array_equal(trained["conv1.weight"], initial["conv1.weight"])


@needs_node
def test_a_loss_that_is_not_finite_stops_the_training(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"the loss is (NaN|Infinity) at step \d+: lower the learning rate"):
        run_script(HERE / "train_digits.mjs", "node", assets, 20, tmp_path / "state.safetensors", "1e30")
    assert not (tmp_path / "state.safetensors").exists()


@needs_node
@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("step.checkpoint.safetensors", lambda f: (f / "step.checkpoint.safetensors").read_bytes()[:-9], "truncated"),
        ("step.checkpoint.safetensors", lambda f: b"text", "not a safetensors file"),
        ("step.onnx", lambda f: (f / "evaluate.onnx").read_bytes(), "the model is no training step"),
    ],
    ids=["truncated", "text", "another model"],
)
def test_what_does_not_fit_is_refused_by_the_training(
    name: str, bad: Any, message: str, assets: Path, tmp_path: Path
) -> None:
    shutil.copytree(assets, tmp_path / "assets")
    (tmp_path / "assets" / name).write_bytes(bad(assets))
    with pytest.raises(AssertionError, match=message):
        run_script(HERE / "train_digits.mjs", "node", tmp_path / "assets", 1, tmp_path / "state.safetensors")


def test_the_assets_are_the_same_every_time(assets: Path, tmp_path: Path) -> None:
    export_assets().write_assets(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == json.loads((assets / "manifest.json").read_text())
