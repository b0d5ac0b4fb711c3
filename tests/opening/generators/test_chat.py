"""A writer and an image backend make an answer together; what the endpoints do wrong is said."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from tersor._errors import TersorError
from tersor.opening.generators.chat import ChatPlusImage, ChatWriter, EndpointImages, no_text, split
from tersor.opening.generators.specs import GeneratorOptions, generator_of
from tersor.opening.judging.client import ChatClient
from tersor.opening.records import Instance, Step

INSTANCE = Instance("0101001", "1", "1", "1", "", "", (Step("Tell a story."),), (Step("x"), Step("y")))


class Plain:
    """A backend that remembers what it drew."""

    def __init__(self) -> None:
        self.drawn = []

    def draw(self, prompt: str, *, seed: int):
        self.drawn.append((prompt, seed))
        return Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. <IMG> Two. <IMG>", ["One.", "Two."]), ("One.", ["One."]), ("**One** <IMG><IMG> Two", ["One", "Two"]),
        ("", []), ("<IMG>", []),
    ],
)  # fmt: skip
def test_texts_are_split_at_their_marks(text, parts) -> None:
    assert split(text) == parts


def test_each_part_is_drawn_from_the_instruction_and_itself() -> None:
    images = Plain()
    pair = ChatPlusImage(lambda instance, n_steps: ["One.", "Two.", "Three."], images, name="x")
    assert [text for text, _ in pair.generate(INSTANCE, n_steps=2, seed=5).steps] == ["One.", "Two."]
    assert images.drawn == [("Tell a story.\nOne.", 5), ("Tell a story.\nTwo.", 6)]
    assert len(pair.generate(INSTANCE, n_steps=None, seed=5).steps) == 3
    assert len(ChatPlusImage(no_text, images, name="x").generate(INSTANCE, n_steps=2, seed=0).steps) == 2
    assert images.drawn[-1] == ("Tell a story.", 1)


def picture() -> str:
    data = io.BytesIO()
    Image.new("RGB", (6, 6), (1, 2, 3)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


class Server(BaseHTTPRequestHandler):
    """Chat and images in the manner of OpenAI; each reply is taken from a list."""

    replies: list
    asked: list

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, body))
        status, answer = self.replies.pop(0)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *given) -> None:
        pass


@pytest.fixture
def server():
    Server.replies, Server.asked = [], []
    running = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()
    thread.join()


def said(text: str) -> dict:
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def test_chat_and_images_come_from_endpoints(server) -> None:
    Server.replies += [
        (503, {}),
        (200, said("One. <IMG> Two. <IMG>")),
        *[(200, {"data": [{"b64_json": picture()}]})] * 2,
    ]
    writer = ChatWriter(ChatClient(server, "writer"), backoff=0.01)
    made = ChatPlusImage(writer, EndpointImages(server, "painter"), name="x").generate(INSTANCE, n_steps=2, seed=0)
    assert [(text, image.getpixel((0, 0))) for text, image in made.steps] == [("One.", (1, 2, 3)), ("Two.", (1, 2, 3))]
    assert [path for path, _ in Server.asked] == ["/v1/chat/completions"] * 2 + ["/v1/images/generations"] * 2
    assert "exactly 2 parts" in json.dumps(Server.asked[0][1])
    assert Server.asked[2][1]["prompt"] == "Tell a story.\nOne."


def test_an_image_endpoint_that_wants_no_format_gets_none(server) -> None:
    Server.replies += [(400, {"error": {"message": "Unknown parameter: 'response_format'"}})]
    Server.replies += [(200, {"data": [{"b64_json": picture()}]})]
    assert EndpointImages(server, "painter").draw("x", seed=0).size == (6, 6)
    assert "response_format" not in Server.asked[1][1]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": {"message": "bad key sesame"}}), r"status 401: bad key \*\*\*"),
        ((200, {"data": []}), "without a picture"), ((200, {"data": [{"b64_json": "AAAA"}]}), "without a picture"),
    ],
)  # fmt: skip
def test_an_image_endpoint_that_refuses_is_named(server, monkeypatch, reply, message) -> None:
    monkeypatch.setenv("PAINTER_KEY", "sesame")
    Server.replies.append(reply)
    with pytest.raises(TersorError, match=message):
        EndpointImages(server, "painter", key_env="PAINTER_KEY").draw("x", seed=0)


def test_a_writer_that_never_answers_is_named(server) -> None:
    Server.replies += [(500, {"error": {"message": "busy"}})] * 6
    with pytest.raises(TersorError, match="does not answer: status 500: busy"):
        ChatWriter(ChatClient(server, "writer"), backoff=0.001)(INSTANCE, 1)


def test_the_command_line_names_both_parts(server) -> None:
    made = generator_of("chat:writer", GeneratorOptions(images="endpoint:painter", base_url=server))
    assert (made.name, made.family) == ("writer+endpoint:painter", "integrated")
