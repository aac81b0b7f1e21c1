"""Tasks of running computers: hosts, services, names, logs. Addresses are documentation networks only."""

from __future__ import annotations

from random import Random

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool


@task(
    tool("check_host", "Ping a host.|Check whether a host answers, and how fast.", address="string: IPv4 address"),
    clauses="""
        check whether {address} is up
        ping {address}
        see if the host {address} responds
        ---
        probe {address} for signs of life
        establish if {address} can be reached
    """,
    answers="""
        {address} is {state}; the average round trip is {ms} ms with {loss} % loss.
        The host {address} is {state} ({ms} ms, {loss} % packets lost).
        {address}: {state}, {ms} ms.
        ---
        Probing {address} took {ms} ms at {loss} % loss, so it is {state}.
        It is {state}, with {loss} % of the packets lost.
    """,
    gap=(
        """
        ping a host for me
        check whether my server is up
        ---
        probe a host for signs of life
        """,
        """
        What is its address?
        Which address should I check?
        ---
        Under what address is it reached?
        """,
        "address",
    ),
)
def host(rng: Random) -> Case:
    slow = rng.random() < 0.3
    result = {
        "state": "unstable" if slow else "up",
        "ms": rng.randint(120, 900) if slow else rng.randint(2, 60),
        "loss": rng.randint(5, 60) if slow else 0,
    }
    return Case({"address": pools.ip(rng)}, result)


@task(
    tool(
        "resolve_domain",
        "Resolve a host name.|Look up the address of a domain.",
        domain="string: Host name",
    ),
    clauses="""
        resolve {domain}
        look up the IP address of {domain}
        find out where {domain} points to
        ---
        translate {domain} into an address
        query the name servers for {domain}
    """,
    answers="""
        {domain} resolves to {address}.
        The address of {domain} is {address} (TTL {ttl} seconds).
        {domain} points to {address}.
        ---
        Name servers give {address} for {domain}, valid {ttl} seconds.
        {address} stands behind {domain}.
    """,
    gap=(
        """
        resolve a domain for me
        ---
        query the name servers for me
        """,
        """
        Which domain?
        What is the host name?
        ---
        For what name?
        """,
        "domain",
    ),
)
def domain(rng: Random) -> Case:
    machine = f"{rng.choice(pools.SERVICES)}{rng.choice(('', '-1', '-2', '-eu', '-test'))}"
    name = f"{machine}.example.{rng.choice(('com', 'org', 'net'))}"
    return Case({"domain": name}, {"address": pools.ip(rng), "ttl": rng.choice((60, 300, 600, 3600))})


@task(
    tool(
        "get_metrics",
        "Load figures of a service.|Error rate and latency of a service over the last hours.",
        service="string: Name of the service",
        hours="integer: How far to look back",
    ),
    clauses="""
        show me the error rate of the {service} service over the last {hours} hours
        check how the {service} service did in the last {hours} hours
        get the latency of {service} for the past {hours} hours
        ---
        pull {hours} hours of figures for {service}
        assess {service} across the previous {hours} hours
    """,
    answers="""
        Over the last {hours} hours {service} had an error rate of {errors} % and a median latency of {latency} ms.
        {service}: {errors} % errors, {latency} ms median latency, {requests} requests.
        The {service} service served {requests} requests with {errors} % errors.
        ---
        {requests} requests reached {service}; {errors} % failed, {latency} ms at the median.
        For {service} I read {latency} ms and {errors} % errors.
    """,
    gap=(
        """
        check how the {service} service did
        ---
        assess the {service} service
        """,
        """
        How many hours back should I look?
        Over how many hours?
        ---
        What span in hours?
        """,
        "hours",
    ),
)
def metrics(rng: Random) -> Case:
    arguments = {"service": rng.choice(pools.SERVICES), "hours": rng.choice((1, 2, 3, 6, 12, 24, 48))}
    result = {"errors": rng.randint(0, 90) / 10, "latency": rng.randint(8, 900), "requests": rng.randint(100, 90000)}
    return Case(arguments, result)


@task(
    tool(
        "restart_service", "Restart a service.|Stop and start a running service.", service="string: Name of the service"
    ),
    clauses="""
        restart the {service} service
        bounce {service}
        stop {service} and start it again
        ---
        give the {service} service a fresh start
        cycle {service}
    """,
    answers="""
        {service} was restarted in {seconds} seconds and runs with pid {pid}.
        The {service} service is back after {seconds} seconds.
        Restarted: {service}, new pid {pid}.
        ---
        {service} came back as process {pid}.
        After {seconds} seconds {service} is running afresh.
    """,
    careful=True,
)
def restart(rng: Random) -> Case:
    result = {"status": "running", "seconds": rng.randint(2, 40), "pid": rng.randint(1000, 60000)}
    return Case({"service": rng.choice(pools.SERVICES)}, result)


@task(
    tool(
        "search_logs",
        "Search the log of a service.|Find log lines of a service by level.",
        service="string: Name of the service",
        level="info/warning/error: Log level",
    ),
    clauses="""
        search the {service} logs for {level} lines
        find the latest {level} in the logs of {service}
        show me the last {level} message of {service}
        ---
        comb the {service} log for the level {level}
        dig up the newest {level} entry of {service}
    """,
    answers="""
        The last {level} line of {service} is "{line}" at {time}.
        {service} logged "{line}" at {time} ({count} lines of level {level} in all).
        There are {count} {level} lines; the latest, at {time}, says "{line}".
        ---
        At {time} {service} wrote "{line}".
        {count} entries, the newest being "{line}".
    """,
    gap=(
        """
        search the {service} logs
        ---
        comb the {service} log
        """,
        """
        For which level: info, warning or error?
        Which log level?
        ---
        What level matters to you?
        """,
        "level",
    ),
)
def logs(rng: Random) -> Case:
    line = rng.choice(
        (
            f"request {rng.randint(1000, 99999)} took {rng.randint(200, 9000)} ms",
            f"worker {rng.randint(1, 64)} joined the pool",
            f"cache at {rng.randint(60, 99)} % of its size",
            f"peer {pools.ip(rng)} closed the connection",
            f"queue length {rng.randint(10, 5000)}",
        )
    )
    result = {"time": pools.clock(rng), "line": line, "count": rng.randint(1, 400)}
    return Case({"service": rng.choice(pools.SERVICES), "level": rng.choice(("info", "warning", "error"))}, result)
