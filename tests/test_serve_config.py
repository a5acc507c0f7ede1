"""A config of Ray Serve as a server's config: read strictly, equal to our short form, and what Serve itself takes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from services_world import run_command
from test_services_config import model, pipeline

from services import app
from services.config import ChatArgs, ServerConfig, load_config
from services.gpus import on_gpus
from services.serve_config import short_form
from services.strict import ServerConfigError

DOCUMENT = """
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
grpc_options:
  port: 9100
  request_timeout_s: 300
  grpc_servicer_functions:
  - services.proxy.add_chat_service
  - services.proxy.add_translation_service
  - services.proxy.add_image_service
  - services.proxy.add_model_service
  - services.proxy.add_health_service
logging_config: {encoding: JSON, enable_access_log: false}
applications:
- name: models
  route_prefix: /models
  import_path: services.app:models
  args: {services: {chat: [assistant, second], translation: [de-en], image: [painter]}, cpus: 0.5}
- name: chat
  route_prefix: /chat
  import_path: services.app:chat
  args:
    models: {assistant: {model: mine, max_num_seqs: 12}, second: {model: mine, dtype: bf16}}
    replicas: 2
    max_replicas: 6
    cpus: 4
    gpus: 1
- name: translation
  route_prefix: /translation
  import_path: services.app:translation
  args: {models: {de-en: {model: words, max_batch_tokens: 640}}, replicas: 1, threads: 2}
- name: image
  route_prefix: /image
  import_path: services.app:image
  args: {models: {painter: {model: sd, max_batch: 5}}}
"""
SHORT_FORM = """
port: 9100
request_timeout_s: 300
chat: {assistant: {model: mine, max_num_seqs: 12}, second: {model: mine, dtype: bf16}}
translation: {de-en: {model: words, max_batch_tokens: 640}}
image: {painter: {model: sd, max_batch: 5}}
scale:
  models: {cpus: 0.5}
  chat: {replicas: 2, max_replicas: 6, cpus: 4, gpus: 1}
  translation: {threads: 2}
"""
PORTS = {"port": 9100, "request_timeout_s": 300}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the models of DOCUMENT, and both forms of the config."""
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "mine")
    model(tmp_path / "words", kind="translation")
    pipeline(tmp_path / "sd")
    (tmp_path / "serve.yaml").write_text(DOCUMENT, "utf-8")
    (tmp_path / "server.yaml").write_text(SHORT_FORM, "utf-8")
    return tmp_path


@pytest.fixture
def document() -> Any:
    return yaml.safe_load(DOCUMENT)


# ---- both forms


def test_both_forms_give_equal_applications(folder: Path) -> None:
    one, other = load_config(folder / "serve.yaml"), load_config(folder / "server.yaml")
    assert one.arguments() == other.arguments()
    assert (one.port, one.request_timeout_s) == (other.port, other.request_timeout_s) == (9100, 300)
    assert settings(one) == settings(other)
    assert settings(one).keys() == {"models", "chat", "translation", "image"}


def test_our_form_without_a_scale_means_what_it_always_did(folder: Path) -> None:
    config = ServerConfig(chat={"a": {"model": "mine"}}, image={"b": {"model": "sd"}}, replicas=2, gpus_per_replica=1)  # type: ignore[dict-item]
    made = settings(config)
    assert {name: (s["replicas"], s["num_gpus"]) for name, s in made.items()} == {
        "models": (1, 0), "chat": (2, 1), "image": (2, 1),
    }  # fmt: skip
    assert [made[name]["init_args"][1] for name in ("chat", "image")] == ["cuda", "cuda"]


def test_options_are_put_over_a_document(folder: Path) -> None:
    config = load_config(folder / "serve.yaml", port=9200, chat={"third": {"model": "mine"}})
    assert config.port == 9200 and config.services["chat"] == ["assistant", "second", "third"]
    assert config.arguments()["models"].model_dump()["services"] == config.services


def test_a_document_that_names_a_folder_that_is_not_there_is_refused_before_anything_starts(folder: Path) -> None:
    (folder / "sd" / "model_index.json").unlink()
    told = run_command(["serve", "serve.yaml"], folder)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == "error: model 'sd' not found: give a folder with a model_index.json, or a run in runs/\n"


# ---- Serve's side


def test_serve_takes_the_document_and_finds_all_that_it_names(document: Any) -> None:
    """As a cluster does it; the models' folders are looked at by the replicas, where the weights are."""
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.config import gRPCOptions
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(document)
    assert short_form(schema.model_dump(mode="json", exclude_unset=True)) == short_form(document)
    assert len(gRPCOptions(**schema.grpc_options.model_dump()).grpc_servicer_func_callable) == 5
    for application in schema.applications:
        builder = import_attr(application.import_path)
        assert builder is app.BUILDERS[application.name]
        built = call_user_app_builder_with_args_if_necessary(builder, application.args)
        assert built._bound_deployment.name == f"{application.name.title().removesuffix('s')}Service"


def test_a_builder_refuses_an_unknown_key_by_its_name() -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    with pytest.raises(ValueError, match=r"models\.a\.dtyp\s+Extra inputs are not permitted"):
        call_user_app_builder_with_args_if_necessary(app.chat, {"models": {"a": {"model": "mine", "dtyp": "bf16"}}})


def test_a_replica_refuses_a_folder_that_it_cannot_serve(folder: Path) -> None:
    from services.chat_model import ChatModel

    for name, said in (("nowhere", "model 'nowhere' not found"), ("words", "holds a translation model; chat needs")):
        args = ChatArgs.model_validate({"models": {"a": {"model": name}}})
        assert app.chat(args)._bound_deployment.name == "ChatService"
        with pytest.raises(ServerConfigError, match=said):
            ChatModel("a", args.models["a"])


# ---- how many, and where


def test_replicas_have_what_the_document_says(folder: Path) -> None:
    made = settings(load_config(folder / "serve.yaml"))
    assert made["chat"] == {
        "replicas": {"min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 12 + 16},
        "num_cpus": 4, "num_gpus": 1, "threads": "4", "retries": 3,
        "max_ongoing_requests": 12 + 64 + 16 + 64 + 16, "init_args": made["chat"]["init_args"],
    }  # fmt: skip
    assert (made["models"]["num_cpus"], made["models"]["replicas"]) == (0.5, 1)
    assert (made["translation"]["threads"], made["translation"]["num_cpus"], made["translation"]["retries"]) == (
        "2", 0, 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("service", "limits", "target"),
    [
        ("chat", {"max_num_seqs": 3}, 3),
        ("translation", {"max_batch_tokens": 640}, 10),  # about 64 tokens a sentence
        ("translation", {"max_batch_tokens": 8}, 1),
        ("image", {"max_batch": 5}, 5),
    ],
)
def test_replicas_are_added_where_requests_would_wait(
    folder: Path, service: str, limits: dict[str, int], target: int
) -> None:
    held = {"chat": "mine", "translation": "words", "image": "sd"}[service]
    scale = {service: {"max_replicas": 4}}
    config = ServerConfig.model_validate({service: {"a": {"model": held, **limits}}, "scale": scale})
    growing = settings(config)[service]["replicas"]
    assert growing == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": target}


def test_on_one_machine_replicas_share_its_cores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster's document starts on a laptop that has fewer cores than it asks for."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    made = settings(load_config(folder / "serve.yaml").sharing_one_machine())
    assert {s["num_cpus"] for s in made.values()} == {0}
    assert {name: made[name]["threads"] for name in ("chat", "translation", "image")} == {
        "chat": "2", "translation": "2", "image": "2",  # 16 cores over 6 + 1 + 1 replicas
    }  # fmt: skip


ALL = {"chat": {"a": {"model": "mine"}}, "translation": {"b": {"model": "words"}}, "image": {"c": {"model": "sd"}}}


@pytest.mark.parametrize(
    ("present", "settings", "parts"),
    [
        (0, {}, (0, 0, 0)),
        (1, {}, (0.3333, 0.3333, 0.3333)),
        (2, {}, (0.5, 0.5, 0.5)),  # not two thirds each: no two of them would be on one GPU
        (3, {}, (1, 1, 1)),
        (8, {}, (1, 1, 1)),
        (1, {"replicas": 2}, (0.1666, 0.1666, 0.1666)),
        (2, {"scale": {"chat": {"max_replicas": 4}}}, (0.3333, 0.3333, 0.3333)),
        (2, {"scale": {"chat": {"gpus": 1}}}, (1, 0.5, 0.5)),
        (2, {"scale": {"chat": {"gpus": 1, "max_replicas": 2}}}, (1, 0, 0)),
        (2, {"scale": {"chat": {"gpus": 0.5}}}, (0.5, 0.5, 0.5)),
        (1, {"scale": {"chat": {"gpus": 0.5}}}, (0.5, 0, 0)),
        (1, {"scale": {"chat": {"gpus": 0}}}, (0, 0.5, 0.5)),
        (1, {"gpus_per_replica": 0}, (0, 0, 0)),
        (1, {"image": {}, "scale": {"image": {"gpus": 1}}}, (0.5, 0.5)),  # an image service that is not there
        (1, {"gpus_per_replica": 0.25}, (0.25, 0.25, 0.25)),
    ],
)
def test_on_one_machine_replicas_share_its_gpus(
    folder: Path, present: int, settings: dict[str, Any], parts: tuple[float, ...]
) -> None:
    config = on_gpus(ServerConfig.model_validate({**ALL, **settings}), present)
    made = [app.applications(config)[service]._bound_deployment for service in config.services]
    assert tuple(deployment.ray_actor_options["num_gpus"] for deployment in made) == parts
    assert [deployment.init_args[1] for deployment in made] == ["cuda" if part else "cpu" for part in parts]


@pytest.mark.parametrize(
    ("present", "scale", "said"),
    [
        (1, {"chat": {"replicas": 2, "gpus": 1}}, r"chat: .* = 2 x 1, .* 1 GPUs 1 are left for it"),
        (1, {"chat": {"gpus": 0.6}, "image": {"gpus": 0.6}}, r"image: .* = 1 x 0\.6, .* 1 GPUs 0\.4 are left for it"),
        (2, {"chat": {"replicas": 3, "gpus": 0.6}}, r"chat: .* = 3 x 0\.6, each of one GPU; .* 2 GPUs 2 are left"),
    ],
)
def test_gpus_that_a_machine_lacks_are_said_before_serve_would_wait_for_them(
    folder: Path, present: int, scale: dict[str, Any], said: str
) -> None:
    with pytest.raises(ServerConfigError, match=said):
        on_gpus(ServerConfig.model_validate({**ALL, "scale": scale}), present)


def test_where_nobody_shares_out_gpus_a_replica_that_names_none_has_none(folder: Path) -> None:
    made = settings(ServerConfig.model_validate(ALL))
    assert {(s["num_gpus"], s["init_args"][1]) for name, s in made.items() if name != "models"} == {(0, "cpu")}


# ---- mistakes


def change(*path: Any, to: Any) -> Callable[[Any], None]:
    """Sets what stands at `path`."""

    def apply(tree: Any) -> None:
        for part in path[:-1]:
            tree = tree[part]
        tree[path[-1]] = to

    return apply


def drop(*path: Any) -> Callable[[Any], None]:
    def apply(tree: Any) -> None:
        for part in path[:-1]:
            tree = tree[part]
        del tree[path[-1]]

    return apply


MODELS, CHAT, TRANSLATION, IMAGE = (("applications", i) for i in range(4))
SERVICERS = ("grpc_options", "grpc_servicer_functions")
WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "unknown key": (
        change("http_option", to={}),
        r"http_option: no such key; valid: .*; did you mean 'http_options'\?",
    ),
    "unknown application": (
        change(*CHAT, "name", to="chatt"),
        r"applications\.1\.name='chatt': Input should be 'chat', .*; did you mean 'chat'\?",
    ),
    "another builder": (
        change(*CHAT, "import_path", to="services.app:chats"),
        r"applications\.chat\.import_path='services\.app:chats': must be 'services\.app:chat'",
    ),
    "no builder": (drop(*CHAT, "import_path"), r"applications\.1\.import_path: is required"),
    "another route": (
        change(*IMAGE, "route_prefix", to="/images"),
        r"applications\.image\.route_prefix='/images': must be '/image'",
    ),
    "no route": (drop(*IMAGE, "route_prefix"), r"applications\.3\.route_prefix: is required"),
    "Serve's own overrides": (
        change(*CHAT, "deployments", to=[{"name": "ChatService"}]),
        r"applications\.1\.deployments: no such key; valid: name, import_path, route_prefix, args",
    ),
    "unknown argument": (
        change(*CHAT, "args", "replica", to=2),
        r"applications\.chat\.args\.replica: no such key; valid: .*; did you mean 'replicas'\?",
    ),
    "unknown model key": (
        change(*CHAT, "args", "models", "assistant", "dtyp", to="bf16"),
        r"applications\.chat\.args\.models\.assistant\.dtyp: no such key; valid: .*; did you mean 'dtype'\?",
    ),
    "wrong dtype": (
        change(*IMAGE, "args", "models", "painter", "dtype", to="fp16"),
        r"applications\.image\.args\.models\.painter\.dtype='fp16': .*; did you mean 'bf16'\?",
    ),
    "no models": (change(*CHAT, "args", "models", to={}), r"applications\.chat\.args\.models=\{\}: .*at least 1 item"),
    "no folder": (
        drop(*CHAT, "args", "models", "second", "model"),
        r"applications\.chat\.args\.models\.second\.model: is required",
    ),
    "no replicas": (change(*TRANSLATION, "args", "replicas", to=0), r"args\.replicas=0: .*greater than 0"),
    "half a replica": (change(*TRANSLATION, "args", "replicas", to=1.5), r"args\.replicas=1\.5: .*valid integer"),
    "fewer at the most": (
        change(*CHAT, "args", "max_replicas", to=1),
        r"applications\.chat\.args\..*max_replicas=1: is below replicas=2; raise or drop it",
    ),
    "fewer than no cpus": (change(*CHAT, "args", "cpus", to=-1), r"args\.cpus=-1: .*greater than or equal to 0"),
    "two gpus": (change(*CHAT, "args", "gpus", to=2), r"args\.gpus=2: .*less than or equal to 1"),
    "no list of models": (drop(*MODELS), "applications: has none called 'models'; add it with services="),
    "another list": (
        change(*MODELS, "args", "services", "chat", to=["assistant"]),
        r"applications\.models\.args\.services=\{.*: the other applications hold \{.*'second'.*; say the same",
    ),
    "an unknown service": (
        change(*MODELS, "args", "services", "images", to=["painter"]),
        r"applications\.models\.args\.services\.images='images': .*; did you mean 'image'\?",
    ),
    "an application twice": (
        lambda tree: tree["applications"].append(copy.deepcopy(tree["applications"][1])),
        "applications: 'chat' is there twice; leave one",
    ),
    "one name for two models": (
        lambda tree: (
            tree["applications"][2]["args"]["models"].update(painter={"model": "words"}),
            tree["applications"][0]["args"]["services"].update(translation=["de-en", "painter"]),
        )[0],
        "image: model name 'painter' is a translation model's; give it another",
    ),
    "an unknown function": (
        change(*SERVICERS, 0, to="services.proxy.add_chats_service"),
        r"add_chats_service': belongs to no application here; valid: .*; did you mean 'services\.proxy\.add_chat_serv",
    ),
    "a function of an application that is not there": (
        lambda tree: (tree["applications"].pop(3), tree["applications"][0]["args"]["services"].pop("image"))[0],
        "grpc_servicer_functions='services.proxy.add_image_service': belongs to no application here",
    ),
    "a function too few": (drop(*SERVICERS, 0), "grpc_servicer_functions: lacks 'services.proxy.add_chat_service'"),
    "health before the others": (
        lambda tree: tree["grpc_options"]["grpc_servicer_functions"].reverse(),
        "add_chat_service': 'services.proxy.add_health_service' must be the last",
    ),
    "no end of a request": (drop("grpc_options", "request_timeout_s"), r"grpc_options\.request_timeout_s: is required"),
    "no gRPC": (drop("grpc_options"), "grpc_options: is required"),
    "a port in quotes": (change("grpc_options", "port", to="9000"), r"grpc_options\.port='9000': .*valid integer"),
    "no such port": (change("grpc_options", "port", to=90000), "port=90000: .*less than 65536"),
    "a wrong HTTP port": (change("http_options", "port", to="x"), r"http_options\.port='x': .*valid integer"),
    "proxies nowhere": (
        change("proxy_location", to="EveryNodes"),
        r"proxy_location='EveryNodes': .*; did you mean 'EveryNode'\?",
    ),
    "applications that are no list": (change("applications", to={"chat": {}}), "applications=.*valid list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_with_the_key_the_value_and_the_fix(folder: Path, document: Any, case: str) -> None:
    spoil, said = WRONG[case]
    spoil(document)
    (folder / "serve.yaml").write_text(yaml.safe_dump(document), "utf-8")
    with pytest.raises(ServerConfigError, match=said):
        load_config(folder / "serve.yaml")


def settings(config: ServerConfig) -> dict[str, dict[str, Any]]:
    """What Serve is told of each application's deployment."""
    return {name: _settings(made._bound_deployment) for name, made in app.applications(config).items()}


def _settings(deployment: Any) -> dict[str, Any]:
    config, options = deployment._deployment_config, deployment.ray_actor_options
    growing = config.autoscaling_config
    bounds = growing and growing.model_dump(include={"min_replicas", "max_replicas", "target_ongoing_requests"})
    return {
        "replicas": bounds or config.num_replicas,
        "max_ongoing_requests": config.max_ongoing_requests,
        "retries": config.max_constructor_retry_count,
        "num_cpus": options["num_cpus"],
        "num_gpus": options["num_gpus"],
        "threads": options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"],
        "init_args": deployment.init_args,
    }
