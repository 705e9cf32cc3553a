"""The `baton` command line. Only declares commands; each imports what it needs when it runs.

The imports inside functions are the point of this file: `baton status` must not wait for what `baton explain` needs,
and nothing here may load torch. All other files import at their top.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from baton.errors import StartFailed
from baton_common.errors import BatonError, ConfigError, ErrorKind

app = typer.Typer(
    name="baton", help="Serve a language model with prefill and decode in separate processes, here or in a cluster.",
    no_args_is_help=True, pretty_exceptions_enable=False,
)  # fmt: skip

_PIPE_WIDTH = 400    # a pipe has no width of its own, and its lines should not be broken
Name = Annotated[str | None, typer.Option(help="name of the service; needed only when several run")]


@app.command()
def up(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL | SERVICE.YAML]", help="checkpoint folder, hub name, service file; none = demo"),
    ] = None,
    prefill: Annotated[int | None, typer.Option(min=0, max=64, help="prefill workers (default: 1)")] = None,
    decode: Annotated[int | None, typer.Option(min=0, max=64, help="decode workers (default: 1)")] = None,
    colocated: Annotated[int | None, typer.Option(min=0, max=64, help="workers that do both (default: 0)")] = None,
    host: Annotated[str | None, typer.Option(help="interface of the endpoint (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="port of the endpoint (default: 8000)")] = None,
    device: Annotated[str | None, typer.Option(help="where the model runs: cpu, cuda, cuda:1")] = None,
    dtype: Annotated[str | None, typer.Option(help="of weights and activations: bfloat16, float32")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="of the KV cache: auto, bfloat16, float32")] = None,
    context_tokens: Annotated[int | None, typer.Option(min=16, help="longest prompt + answer")] = None,
    wire: Annotated[str | None, typer.Option(help="how KV travels: auto, shm, tcp, nixl, mooncake")] = None,
    served_name: Annotated[str | None, typer.Option(help="model name in API requests")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with settings of router, worker, engine, transfer")] = None,
    name: Annotated[str | None, typer.Option(help="name of the service (default: default)")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="return when it serves, leave it running")] = False,
    ready_timeout: Annotated[float, typer.Option(min=1, help="give up when not ready after so many seconds")] = 600.0,
) -> None:
    """Start a router and its workers and keep them running; Ctrl-C stops them all."""
    from baton.request import UpOptions
    from baton.state import state_home
    from baton.up import detached, foreground

    options = UpOptions(
        target=target, name=name, host=host, port=port, prefill=prefill, decode=decode, colocated=colocated,
        device=device, dtype=dtype, kv_dtype=kv_dtype, context_tokens=context_tokens, wire=wire,
        served_name=served_name, config=config,
    )  # fmt: skip
    start = detached if detach else foreground
    status = start(
        options, home=state_home(os.environ), environment=os.environ, console=_console(), ready_timeout_s=ready_timeout
    )
    raise typer.Exit(status)


@app.command()
def down(name: Name = None) -> None:
    """Stop a service and all of its processes."""
    from baton.state import find_running, state_home
    from baton.up import down as stop

    service = find_running(state_home(os.environ), name)
    if service is None:
        sys.stdout.write(f"baton: no service{f' {name!r}' if name else ''} is running\n")
        return
    stop(service, _console())


@app.command()
def chat(
    once: Annotated[str | None, typer.Option(help="ask this one question, print the answer, leave")] = None,
    url: Annotated[str | None, typer.Option(help="endpoint (default: the running service)")] = None,
    model: Annotated[str | None, typer.Option(help="model name (default: the first one served)")] = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 = always the likeliest token")] = None,
    seed: Annotated[int | None, typer.Option(help="same seed, same answer")] = None,
    api_key: Annotated[str, typer.Option(envvar="BATON_API_KEY", help="bearer key")] = "",
    name: Name = None,
) -> None:
    """Talk to a service: streams the answers, shows time to first token, speed and cached tokens."""
    from baton.chat import Chat
    from baton.chat_client import ChatClient, Sampling
    from baton.state import find_running, state_home
    from baton_common.clock import SystemClock

    service = None if url else find_running(state_home(os.environ), name)
    state = service.read() if service else None
    client = ChatClient(url or (state.url if state else "http://127.0.0.1:8000"), SystemClock(), api_key=api_key)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    console = Console(stderr=True)
    talk = Chat(client, model or client.model(), system=system, sampling=sampling, console=console)
    if once is not None:
        talk.answer(once)
    else:
        talk.converse()


@app.command()
def status(
    service: Annotated[
        str | None, typer.Argument(metavar="NAME", help="of the service; none = the only one, with -n all of them")
    ] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="of a cluster: look there")] = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="look in the whole cluster")] = False,
    kubeconfig: Annotated[Path | None, typer.Option(help="default: $KUBECONFIG, ~/.kube/config, the pod's own")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="in a cluster: go on until Ctrl-C")] = False,
    output: Annotated[str, typer.Option("--output", "-o", metavar="text|json", help="in a cluster: form")] = "text",
    name: Name = None,
) -> None:
    """Show how services stand: those of this machine, or with -n those of a cluster, and why one is not Ready.

    Exit status: 0 ready; 1 not ready on this machine, nothing there, or no answer; 2 a mistake in the command; 3 a
    service of the cluster is not Ready.
    """
    wanted = _one_name(service, name)
    if namespace is not None or all_namespaces:
        from baton.cluster_status import Output, Scope, run

        if namespace is not None and all_namespaces:
            raise ConfigError("-n is one namespace, -A are all of them; drop one", param="namespace")
        if all_namespaces and wanted:
            raise ConfigError("a name belongs to one namespace; give -n NAMESPACE instead of -A", param="namespace")
        if output not in tuple(Output):
            raise ConfigError(f"--output {output}: use {' or '.join(Output)}", param="output")
        scope = Scope(namespace=namespace or "", name=wanted or "")
        raise typer.Exit(
            run(scope, kubeconfig=kubeconfig, environment=os.environ, home=Path.home(), output=Output(output),
                watch=watch, console=_console())
        )  # fmt: skip
    if kubeconfig is not None or watch or output != "text":
        raise ConfigError("--kubeconfig, --watch, --output are of clusters; add -n NAMESPACE or -A", param="namespace")
    from baton.state import find_running, state_home
    from baton.status import show

    found = find_running(state_home(os.environ), wanted)
    state = found.read() if found else None
    if state is None:
        sys.stdout.write(f"baton: no service{f' {wanted!r}' if wanted else ''} is running\n")
        raise typer.Exit(1)
    raise typer.Exit(0 if show(state, _console()) else 1)


def _one_name(argument: str | None, option: str | None) -> str | None:
    if argument and option and argument != option:
        raise ConfigError(f"two names: {argument} and --name {option}; drop one", param="name")
    return argument or option


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="YAML with one InferenceService")],
    local: Annotated[bool, typer.Option("--local", help="for `baton up` on this machine, not for a cluster")] = False,
) -> None:
    """Check a service file by the rules of the cluster; every fault is named with its line."""
    from baton_operator.api import Place, Role
    from baton_operator.document import read_service

    service = read_service(file, place=Place.MACHINE if local else Place.CLUSTER)
    spec = service.spec
    workers = ", ".join(f"{spec.pool(role).least} {role}" for role in Role)
    sys.stdout.write(f"{file}: {service.metadata.name} is valid: {spec.model.uri}, {workers}\n")


@app.command()
def render(
    file: Annotated[Path, typer.Argument(help="YAML with one InferenceService")],
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="where it would be (default: the file's, else default)")
    ] = None,
    profile_file: Annotated[
        Path | None, typer.Option(help="YAML with the AcceleratorProfile (default: the one that comes with Baton)")
    ] = None,
    router_image: Annotated[str | None, typer.Option(help="as in the operator's settings")] = None,
    worker_image: Annotated[
        str | None, typer.Option(help="the same; {flavour} becomes the profile's, like cpu or cuda")
    ] = None,
    pull_secrets: Annotated[str | None, typer.Option(help="Secrets for pulling both images, comma separated")] = None,
    also: Annotated[
        str, typer.Option("--with", metavar="monitors,http-routes", help="kinds that the cluster has beyond the usual")
    ] = "",
) -> None:
    """Print the objects that the operator would make of a service file; what is assumed goes to standard error."""
    from baton.render import extras
    from baton.render import render as made
    from baton_common.settings import resolve
    from baton_operator.config import OperatorConfig

    flags = {"router_image": router_image, "worker_image": worker_image, "image_pull_secrets": pull_secrets}
    config = resolve(OperatorConfig, section="operator", environment=os.environ, flags=flags).value
    rendered = made(file, namespace=namespace, profile_file=profile_file, config=config, extra=extras(also))
    sys.stderr.write("".join(f"baton: assumed: {line}\n" for line in rendered.assumed))
    sys.stdout.write(rendered.as_yaml())


@app.command()
def explain(
    section: Annotated[
        str | None, typer.Argument(help="router, worker, engine or transfer, none = all; or kernels: what runs where")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with settings, as for `baton up`")] = None,
    device: Annotated[str | None, typer.Option(help="kernels: cuda, or an architecture like sm_90 or gfx950")] = None,
    model: Annotated[str | None, typer.Option(help="kernels: checkpoint folder or hub name; none = the demo")] = None,
) -> None:
    """Show every setting: its value, where it came from (default, file, environment) and what it does.

    `baton explain kernels` shows which kernel runs for each operation of a model on a device, and why.
    """
    from baton.explain import show

    if section == "kernels":
        from baton.explain_kernels import show_kernels

        show_kernels(device, model, file=config, environment=os.environ, console=_console())
        return
    if device is not None or model is not None:
        raise ConfigError("--device and --model belong to `baton explain kernels`")
    show(section, file=config, environment=os.environ, console=_console())


@app.command()
def version() -> None:
    """Print the version."""
    sys.stdout.write(f"baton {installed_version('baton')}\n")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def main() -> None:
    """Entry point. What a user can act on is one line on stderr; exit status 1, or 2 for a mistake in input."""
    try:
        app()
    except StartFailed as error:
        sys.stderr.write(f"baton: {error.message}\n")
        sys.exit(error.status)
    except BatonError as error:
        # several lines are faults in a file, as compilers write them: file:line: what
        sys.stderr.write(f"{error.message}\n" if "\n" in error.message else f"baton: {error.message}\n")
        sys.exit(2 if error.kind is ErrorKind.INVALID else 1)
    except KeyboardInterrupt:
        sys.exit(130)
