"""The page: what is where, and what a press does. All work is the engine's; all text that comes back is markup's.

One order runs at a time (gradio's queue); each step reaches the page as it ends. Nothing is fetched from a network: fonts are
the system's, analytics, sharing, the API page and the run history are off.
"""

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from loragraft.backbones.load import find_spec, shipped_bases
from loragraft.demo import markup
from loragraft.demo.engine import Engine, Order, Picture, StoppedError
from loragraft.demo.figures import adapter_size, memory
from loragraft.evaluation.generate import Settings
from loragraft.recipes.load import list_recipes, load_recipe

MOST_ADAPTERS = 4
OWN_EXAMPLES, EXAMPLES_PER_RECIPE = 4, 2
UNFORESEEN = "That failed in a way nobody foresaw: the corner of this page says what, and the terminal where."
NO_ADAPTERS = "None found in the given folders. Train one, then reload this page; the base alone draws meanwhile."
READY = "Ready. Write a prompt or pick an example, then press Generate."
SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Liberation Mono", "monospace")

Slots = list[str | None]
"""Which adapter each weight slider belongs to."""


class Page:
    """The event handlers, over one engine."""

    def __init__(self, engine: Engine, base: str, precision: str) -> None:
        self.engine = engine
        self.base, self.precision = base, precision
        self._stopped: set[str] = set()
        """Sessions that pressed stop since their last press of generate."""

    def look(self) -> tuple[Any, Any, str]:
        """On every load of the page: the adapters that are there now, and the model's figures."""
        listing = self.engine.catalogue.listing()
        found = list(listing.adapters)
        info = f"{len(found)} found. Several can be grafted together." if found else NO_ADAPTERS
        unreadable = gr.HTML(markup.problems(listing.problems), visible=bool(listing.problems))
        return gr.Dropdown(choices=found, info=info), unreadable, self.figures([], ())

    def figures(self, pictures: Sequence[Picture], labels: Sequence[str]) -> str:
        """Of the base in memory; nothing while another visitor's order loads one."""
        if self.engine.loaded is None:
            return ""
        adapters = [self.engine.catalogue.load(label) for label in labels]
        return markup.figures(self.engine.loaded, memory(self.engine.device), adapter_size(adapters), pictures)

    def arm(self, request: gr.Request) -> tuple[Any, Any, str]:
        """Generate was pressed: forget an older stop, swap the buttons, say that the order waits."""
        self._stopped.discard(str(request.session_hash))
        return gr.Button(interactive=False), gr.Button(interactive=True), markup.working("Waiting for its turn")

    def disarm(self) -> tuple[Any, Any]:
        """The order has ended."""
        return gr.Button(interactive=True), gr.Button(interactive=False)

    def give_up(self) -> tuple[Any, Any, str]:
        """The order has ended in an exception that `generate` does not put into words."""
        return *self.disarm(), markup.failed(UNFORESEEN)

    def stop(self, request: gr.Request) -> None:
        """The sampler sees it at the end of its step."""
        self._stopped.add(str(request.session_hash))

    def generate(self, *values: Any, session: str) -> Iterator[tuple[Any, Any, Any, Any]]:
        """`values` as `read_order` takes them. Yields (status, base picture, adapted picture, figures) at every event."""
        try:
            order = read_order(*values)
        except ValueError as error:
            yield markup.failed(str(error)), gr.skip(), gr.skip(), gr.skip()
            return
        yield (
            markup.working(f"Preparing {order.base}, {markup.WORDS[order.precision]}"),
            gr.skip(),
            gr.skip(),
            gr.skip(),
        )
        pictures: list[Picture] = []
        for event in self._events(order, session):
            if isinstance(event, Picture):
                pictures.append(event)
                after = event.image if event.adapted else gr.skip()
                figures = self.figures(pictures, [label for label, _ in order.adapters])
                yield gr.skip(), gr.skip() if event.adapted else event.image, after, figures
            elif isinstance(event, Exception):
                say = markup.idle if isinstance(event, StoppedError) else markup.failed
                yield say(str(event)), gr.skip(), gr.skip(), gr.skip()
                return
            else:
                adapted, done, steps = event
                share = (done / steps + adapted) / (2 if order.adapters else 1)
                text = f"{'With adapters' if adapted else 'Base'}: step {done} of {steps}"
                older = gr.skip() if adapted or done > 1 else None  # only now is it sure that new pictures come
                yield markup.working(text, share), older, older, gr.skip()
        yield markup.idle(markup.summary(order, pictures)), gr.skip(), gr.skip(), gr.skip()

    def _events(self, order: Order, session: str) -> Iterator[Picture | Exception | tuple[bool, int, int]]:
        """Runs the order in a thread of its own, so that its steps can be told while it runs.

        A reader that goes away (the browser was closed) stops it. A mistake of the user ends it with the exception as the
        last event; anything else is raised here.
        """
        events: queue.SimpleQueue[Picture | BaseException | tuple[bool, int, int] | None] = queue.SimpleQueue()
        gone = threading.Event()

        def report(adapted: bool, done: int, steps: int) -> None:
            events.put((adapted, done, steps))
            if gone.is_set() or session in self._stopped:
                who = "with adapters" if adapted else "base"
                raise StoppedError(f"Stopped after step {done} of {steps} ({who}).")

        def work() -> None:
            try:
                if session in self._stopped:
                    raise StoppedError("Stopped before the first step.")
                for picture in self.engine.draw(order, report):
                    events.put(picture)
                events.put(None)
            except BaseException as error:  # handed over to the reader's thread, which raises it
                events.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, StoppedError | ValueError | FileNotFoundError):
                    yield event
                    return
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            gone.set()
            worker.join()


def read_order(
    prompt: str,
    negative_prompt: str,
    seed: float | None,
    steps: float | None,
    guidance: float | None,
    base: str,
    precision: str,
    any_base: bool,
    start: str | None,
    strength: float,
    slots: Slots,
    *weights: float,
) -> Order:
    """The page's fields in the order of `Controls.inputs`. Raises ValueError for an empty number."""
    if seed is None or steps is None or guidance is None:
        raise ValueError("Steps, guidance or seed is empty: give each a number.")
    return Order(
        settings=Settings(
            prompt=prompt, negative_prompt=negative_prompt, seed=int(seed), steps=int(steps), guidance=float(guidance)
        ),
        base=base,
        precision=precision,
        adapters=tuple((label, weight) for label, weight in zip(slots, weights, strict=True) if label is not None),
        any_base=any_base,
        start=Path(start) if start else None,
        strength=strength,
    )


def assign(picked: list[str], slots: Slots) -> list[Any]:
    """Sliders follow the picked adapters; one that stays picked keeps its slider, and so its weight."""
    kept: Slots = [label if label in picked else None for label in slots]
    for new in picked:
        if new not in kept:
            kept[kept.index(None)] = new
    sliders: list[Any] = []
    for before, label in zip(slots, kept, strict=True):
        if label is None:
            sliders.append(gr.Slider(visible=False))
        elif label == before:
            sliders.append(gr.skip())
        else:
            sliders.append(gr.Slider(visible=True, label=f"Weight of {label}", value=1.0))
    return [kept, gr.Image(visible=bool(picked)), *sliders]


def examples(base: str) -> list[str]:
    """A few things that the base draws, then sample prompts of the recipes of built-in domains."""
    own = list(find_spec(base).calibration_prompts[:OWN_EXAMPLES])
    recipes = [recipe for recipe in map(load_recipe, list_recipes()) if recipe.data.domain]
    prompts = [prompt for recipe in recipes for prompt in recipe.sample.prompts[:EXAMPLES_PER_RECIPE]]
    return list(dict.fromkeys([*own, *prompts]))


def passed_on(payload: Any) -> str | None:
    """An upload as it came: a file that is no picture is the engine's to refuse, in its words."""
    return None if payload is None else payload.path


@dataclass(frozen=True, kw_only=True)
class Controls:
    """The left panel: what to draw."""

    prompt: gr.Textbox
    picker: gr.Dropdown
    slots: gr.State
    sliders: list[gr.Slider]
    unreadable: gr.HTML
    base: gr.Dropdown
    precision: gr.Dropdown
    steps: gr.Number
    guidance: gr.Number
    seed: gr.Number
    start: gr.Image
    strength: gr.Slider
    negative: gr.Textbox
    any_base: gr.Checkbox

    @property
    def inputs(self) -> list[Any]:
        """In the order of `read_order`."""
        words, numbers = [self.prompt, self.negative], [self.seed, self.steps, self.guidance]
        model, picture = [self.base, self.precision, self.any_base], [self.start, self.strength]
        return [*words, *numbers, *model, *picture, self.slots, *self.sliders]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The right panel: what came of it."""

    before: gr.Image
    after: gr.Image
    go: gr.Button
    halt: gr.Button
    status: gr.HTML
    figures: gr.HTML


def build(page: Page) -> gr.Blocks:
    """Two panels: what to draw, and what came of it."""
    with gr.Blocks(title="Loragraft", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(markup.HEADER)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, elem_id="controls"):
                controls = lay_controls(page)
            with gr.Column(scale=7, elem_id="results"):
                results = lay_results()
        connect(page, blocks, controls, results)
    return blocks


def lay_controls(page: Page) -> Controls:
    """From the prompt down to what is seldom used."""
    prompt = gr.Textbox(
        value="", label="Prompt", lines=2, max_lines=4, placeholder="red heart icon", elem_id="prompt", autofocus=True
    )
    gr.Examples([[text] for text in examples(page.base)], [prompt], label="Examples", elem_id="examples")
    slots = gr.State([None] * MOST_ADAPTERS)
    picker = gr.Dropdown(
        [], value=[], multiselect=True, max_choices=MOST_ADAPTERS, label="Adapters", elem_id="adapters"
    )
    sliders = [gr.Slider(0, 2, 1, step=0.05, visible=False, elem_id=f"weight-{i}") for i in range(MOST_ADAPTERS)]
    unreadable = gr.HTML(visible=False, elem_id="unreadable")
    with gr.Row():
        base = gr.Dropdown(shipped_bases(), value=page.base, label="Base", elem_id="base", scale=2)
        words = [(word, key) for key, word in markup.WORDS.items()]
        precision = gr.Dropdown(words, value=page.precision, label="Precision", elem_id="precision", scale=3)
    with gr.Row():
        narrow: dict[str, Any] = {"min_width": 90}
        own = find_spec(page.base).guidance
        steps = gr.Number(20, label="Steps", precision=0, elem_id="steps", **narrow)
        guidance = gr.Number(own, label="Guidance", minimum=1, maximum=20, step=0.5, elem_id="guidance", **narrow)
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", **narrow)
    with gr.Accordion("Start from a picture", open=False, elem_id="start-panel"):
        where = ["upload", "clipboard"]
        start = gr.Image(type="filepath", sources=where, label="Start picture", height=180, elem_id="start")
        start.preprocess = passed_on  # a subclass would need a front end of its own
        strength = gr.Slider(
            0.05, 1, 0.6, step=0.05, visible=False, label="Strength", elem_id="strength",
            info="How much noise the picture gets: low keeps it, 1 ignores it.",
        )  # fmt: skip
    with gr.Accordion("More", open=False):
        negative = gr.Textbox(value="", label="Negative prompt", lines=1, elem_id="negative")
        any_base = gr.Checkbox(
            label="Graft adapters of another base or precision too", elem_id="any-base",
            info="Off: such an adapter is refused, because it was trained on other weights.",
        )  # fmt: skip
    return Controls(
        prompt=prompt, picker=picker, slots=slots, sliders=sliders, unreadable=unreadable, base=base, precision=precision,
        steps=steps, guidance=guidance, seed=seed, start=start, strength=strength, negative=negative, any_base=any_base,
    )  # fmt: skip


def lay_results() -> Results:
    """Two pictures, the buttons, and what is said of them."""
    with gr.Row(elem_id="pictures"):
        look: dict[str, Any] = {
            "interactive": False, "format": "png", "type": "pil", "height": 340, "buttons": ["download", "fullscreen"],
        }  # fmt: skip
        before = gr.Image(label="Base", elem_id="before", **look)
        after = gr.Image(label="With adapters, same seed", elem_id="after", visible=False, **look)
    with gr.Row(elem_id="buttons"):
        go = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
        halt = gr.Button("Stop", variant="secondary", interactive=False, elem_id="stop", scale=1)
    status = gr.HTML(markup.idle(READY), elem_id="status")
    return Results(before=before, after=after, go=go, halt=halt, status=status, figures=gr.HTML(elem_id="figures"))


def connect(page: Page, blocks: gr.Blocks, on: Controls, out: Results) -> None:
    """What a press, a pick and an upload do."""

    def generate(request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
        yield from page.generate(*values, session=str(request.session_hash))

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    blocks.load(page.look, None, [on.picker, on.unreadable, out.figures], **quiet)
    on.picker.change(assign, [on.picker, on.slots], [on.slots, out.after, *on.sliders], **quiet)
    on.start.change(lambda file: gr.Slider(visible=file is not None), on.start, on.strength, **quiet)
    buttons, shown = [out.go, out.halt], [out.status, out.before, out.after, out.figures]
    for event in (out.go.click, on.prompt.submit):
        drawn = event(page.arm, None, [*buttons, out.status], queue=False, **quiet).then(
            generate, on.inputs, shown, concurrency_limit=1, concurrency_id="draw", **quiet
        )
        drawn.success(page.disarm, None, buttons, queue=False, **quiet)
        drawn.failure(page.give_up, None, [*buttons, out.status], queue=False, **quiet)
    out.halt.click(page.stop, None, None, queue=False, **quiet)


def serve(page: Page, host: str, port: int, *, open_browser: bool) -> None:
    """Shows the page until ctrl-C. Raises ValueError if the address cannot be had."""
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        spacing_size="sm",
        radius_size="md",
        font=SYSTEM_FONTS,
        font_mono=MONO_FONTS,
    )
    with TemporaryDirectory(prefix="loragraft-demo-") as uploads:  # gradio would keep pictures in the system's for good
        os.environ["GRADIO_TEMP_DIR"] = uploads
        blocks = build(page)
        try:
            _, url, _ = blocks.queue(default_concurrency_limit=1).launch(
                server_name=host, server_port=port, inbrowser=open_browser, theme=theme,
                css_paths=Path(__file__).with_name("page.css"), share=False, quiet=True, show_error=True, prevent_thread_lock=True,
                footer_links=[], run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False,
            )  # fmt: skip
        except (OSError, OverflowError) as error:  # the latter for a port above 65535
            raise ValueError(f"{host}:{port} cannot be had ({error}); give another --port") from error
        print(f"loragraft demo: {url} (ctrl-C ends it)", flush=True)
        blocks.block_thread()
