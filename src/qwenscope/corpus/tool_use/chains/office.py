"""Chains of the office: mail, files, research, services."""

from __future__ import annotations

from random import Random
from typing import Any

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, Steps, chain


@chain(
    "find_contact",
    "send_email",
    clauses="""
        find the address of {name} and email them "{body}"
        look up {name} and send them this message: "{body}"
        get {name}'s email from my contacts, then write to them "{body}"
        ---
        reach out to {name}, whose address is in my book, with the words "{body}"
        contact {name} by mail and tell them "{body}" (look the address up first)
    """,
    links="""
        The address of {name} is {to}. Now I will send the message.
        Found {name}: {to}. Sending the email.
        ---
        {to} is what the book says, so the mail goes there.
    """,
    answers="""
        I found {name} at {to} and sent your message.
        Your message to {name} ({to}) is on its way.
        Done: "{body}" went to {to}.
        ---
        {name} has been told; I used {to}.
        The words went out to {to}, which belongs to {name}.
    """,
)
def contact_then_mail(rng: Random) -> tuple[Steps, dict[str, Any]]:
    name = pools.person(rng)
    to, body = (
        pools.email(name),
        rng.choice(("See you at {0}.", "Let us meet at {0}.", "The call is at {0}.")).format(pools.clock(rng)),
    )
    found = Case(
        {"name": name}, {"name": name, "company": rng.choice(pools.COMPANIES), "email": to, "phone": pools.phone(rng)}
    )
    sent = Case(
        {"to": to, "subject": "Message", "body": body}, {"status": "sent", "message_id": pools.code(rng, "MSG")}
    )
    return [("find_contact", found), ("send_email", sent)], {"name": name, "to": to, "body": body}


@chain(
    "file_read",
    "code_execute",
    "file_write",
    clauses="""
        read the numbers in {path}, add them up and save the total to {target}
        sum the values of {path} and write the result to {target}
        open {path}, compute the total of its numbers and store it in {target}
        ---
        take {path}, total its figures and leave the outcome in {target}
        produce {target} holding the grand total of {path}
    """,
    links="""
        Next step.
        I have what I need to continue.
        That worked, going on.
        ---
        On to the following part.
    """,
    answers="""
        The {count} numbers in {path} add up to {total}; the total is saved in {target}.
        I summed {path}: {total}. You will find it in {target}.
        Total: {total}, written to {target}.
        ---
        {target} now holds {total}, the grand total of {count} figures.
        {path} comes to {total}; the outcome sits in {target}.
    """,
)
def total_of_file(rng: Random) -> tuple[Steps, dict[str, Any]]:
    numbers = [rng.randint(1, 999) for _ in range(rng.randint(3, 6))]
    path, target, total = pools.path(rng, "csv", "txt"), pools.path(rng, "txt", "md"), sum(numbers)
    source = f"print({' + '.join(map(str, numbers))})"
    written = {"path": target, "content": f"total: {total}"}
    steps: Steps = [
        ("file_read", Case({"path": path}, "\n".join(map(str, numbers)))),
        ("code_execute", Case({"code": source}, str(total))),
        ("file_write", Case(written, {"status": "ok", "bytes": len(f"total: {total}")})),
    ]
    return steps, {"path": path, "target": target, "total": total, "count": len(numbers)}


@chain(
    "web_search",
    "file_write",
    clauses="""
        search for {topic} and save the best link to {path}
        research {topic} and note the most useful page in {path}
        find a good page about {topic}, then write its address to {path}
        ---
        collect one source on {topic} into {path}
        fill {path} with a reference concerning {topic}
    """,
    links="""
        "{title}" looks like the best match. I will save it.
        I will note {url} in the file.
        ---
        Worth keeping: {url}. Writing it down.
    """,
    answers="""
        I saved "{title}" ({url}) to {path}.
        The best page on {topic} is {url}; it is noted in {path}.
        Done, {path} contains the link to "{title}".
        ---
        {path} now refers to {url}.
        The reference "{title}" has been put into {path}.
    """,
)
def search_then_save(rng: Random) -> tuple[Steps, dict[str, Any]]:
    topic, path = rng.choice(pools.TOPICS), pools.path(rng, "md", "txt")
    title = f"{rng.choice(('Notes on', 'A guide to', 'Understanding'))} {topic} in {rng.choice(pools.CITIES)}"
    url = f"https://www.example.org/{topic.replace(' ', '-')}/{rng.randint(10, 999)}"
    steps: Steps = [
        ("web_search", Case({"query": topic}, {"results": [{"title": title, "url": url}]})),
        (
            "file_write",
            Case({"path": path, "content": f"{title}\n{url}"}, {"status": "ok", "bytes": len(title) + len(url) + 1}),
        ),
    ]
    return steps, {"topic": topic, "path": path, "title": title, "url": url}


@chain(
    "get_metrics",
    "search_logs",
    "create_ticket",
    clauses="""
        check {service} over {hours} hours; if more than 2 % of requests fail, look at the logs and open a ticket
        see if the {service} service is healthy ({hours} hours); if not, find the last error and report it
        ---
        assess {service} across {hours} hours and raise whatever is wrong with support
    """,
    links="""
        The error rate is {errors} %, so I will go on.
        {errors} % of the requests failed. Next step.
        ---
        {errors} % is too much; continuing.
    """,
    answers="""
        {service} fails {errors} % of its requests; the last error is "{line}". I opened ticket {ticket}.
        The error rate of {service} is {errors} %. Ticket {ticket} describes the problem ("{line}").
        ---
        Support has {ticket} now: {service}, {errors} % errors, "{line}".
        "{line}" is what {service} logged last; {ticket} tracks it.
    """,
    otherwise="""
        {service} is healthy: only {errors} % of its requests failed in {hours} hours, so there is nothing to report.
        The error rate of {service} is {errors} %, below your limit. I opened no ticket.
        ---
        At {errors} % errors {service} needs no attention.
        Nothing to raise: {service} fails {errors} % of the time only.
    """,
)
def incident(rng: Random) -> tuple[Steps, dict[str, Any]]:
    service, hours = rng.choice(pools.SERVICES), rng.choice((1, 2, 3, 6, 12, 24))
    healthy = rng.random() < 0.35
    errors = rng.randint(0, 19) / 10 if healthy else rng.randint(21, 150) / 10
    figures = {"errors": errors, "latency": rng.randint(8, 900), "requests": rng.randint(100, 90000)}
    slots = {"service": service, "hours": hours, "errors": errors}
    steps: Steps = [("get_metrics", Case({"service": service, "hours": hours}, figures))]
    if healthy:
        return steps, {**slots, "stopped": True}
    peer = pools.ip(rng)
    line = rng.choice((f"peer {peer} closed the connection", f"no answer from {peer}", f"queue full at {peer}"))
    report = {"title": f"{service}: {errors} % errors, {line}", "priority": "high" if errors < 8 else "urgent"}
    ticket = pools.code(rng, "TCK")
    entry = {"time": pools.clock(rng), "line": line, "count": rng.randint(1, 400)}
    steps.append(("search_logs", Case({"service": service, "level": "error"}, entry)))
    steps.append(("create_ticket", Case(report, {"ticket": ticket, "team": f"Team {rng.choice(pools.LAST_NAMES)}"})))
    return steps, {**slots, "line": line, "ticket": ticket}


@chain(
    "resolve_domain",
    "check_host",
    clauses="""
        find the address of {domain} and ping it
        check whether {domain} is up: resolve it first, then ping the address
        ---
        probe whatever machine stands behind {domain}
        translate {domain} into an address and establish if it answers
    """,
    links="""
        {domain} is {address}. Pinging it.
        The address is {address}; checking it now.
        ---
        {address} it is, so I probe that.
    """,
    answers="""
        {domain} ({address}) is {state}: {ms} ms, {loss} % loss.
        The host behind {domain} is {address}, and it is {state}.
        I resolved {domain} to {address}; the round trip takes {ms} ms.
        ---
        Behind {domain} stands {address}, {state}, answering in {ms} ms.
        {address} loses {loss} % of packets, which makes {domain} {state}.
    """,
)
def reachable(rng: Random) -> tuple[Steps, dict[str, Any]]:
    domain = f"{rng.choice(pools.SERVICES)}-{rng.randint(1, 40)}.example.{rng.choice(('com', 'org', 'net'))}"
    address, slow = pools.ip(rng), rng.random() < 0.3
    answer = {
        "state": "unstable" if slow else "up",
        "ms": rng.randint(120, 900) if slow else rng.randint(2, 60),
        "loss": rng.randint(5, 60) if slow else 0,
    }
    steps: Steps = [
        ("resolve_domain", Case({"domain": domain}, {"address": address, "ttl": rng.choice((60, 300, 3600))})),
        ("check_host", Case({"address": address}, answer)),
    ]
    return steps, {"domain": domain, "address": address, **answer}


@chain(
    "list_directory",
    "file_read",
    clauses="""
        look into {folder} and read the file about the {stem}
        find the {stem} file in {folder} and tell me what it says
        ---
        peek into {folder}, then open whichever file concerns the {stem}
    """,
    links="""
        The file must be {path}.
        I see {path}. Reading it.
        ---
        {path} is the one.
    """,
    answers="""
        {path} says: {listing}.
        I found {path}. It lists {listing}.
        The {stem} file contains {listing}.
        ---
        What {path} holds: {listing}.
        Opened {path}; there one reads {listing}.
    """,
)
def open_from_folder(rng: Random) -> tuple[Steps, dict[str, Any]]:
    folder = f"{rng.choice(pools.FOLDERS)}/{rng.randint(2015, 2027)}"
    stems = rng.sample(pools.STEMS, rng.randint(3, 5))
    files, lines = [f"{stem}.txt" for stem in sorted(stems)], rng.sample(pools.TODOS, rng.randint(2, 3))
    path = f"{folder}/{stems[0]}.txt"
    steps: Steps = [
        ("list_directory", Case({"folder": folder}, {"files": files})),
        ("file_read", Case({"path": path}, "\n".join(lines))),
    ]
    return steps, {"folder": folder, "stem": stems[0], "path": path, "listing": pools.listing(lines)}


@chain(
    "query_database",
    "query_database",
    "code_execute",
    clauses="""
        compare the number of {product} orders from {first} and {second} in {year}: what is the difference?
        query the {product} orders of {year} for {first} and then for {second}, and compute the difference
        ---
        derive by how much {first} and {second} differ in {product} orders, year {year}
    """,
    links="""
        Got it, going on.
        One number down.
        Next query.
        ---
        Onwards.
    """,
    answers="""
        {first} had {a} orders and {second} had {b}, a difference of {gap}.
        In {year} {first} ordered {a} and {second} {b}; that is {gap} apart.
        The difference is {gap} ({a} against {b}).
        ---
        {gap} orders lie between {first} ({a}) and {second} ({b}).
        They differ by {gap}: {a} for {first}, {b} for {second}.
    """,
)
def compare_orders(rng: Random) -> tuple[Steps, dict[str, Any]]:
    product, year = rng.choice(pools.PRODUCTS), rng.randint(2018, 2026)
    first, second = rng.sample(pools.CITIES, 2)
    a, b = rng.randint(0, 4000), rng.randint(0, 4000)
    steps: Steps = []
    for city, count in ((first, a), (second, b)):
        sql = f"SELECT COUNT(*) AS n FROM orders WHERE product = '{product}' AND city = '{city}' AND year = {year}"
        steps.append(("query_database", Case({"sql": sql}, {"rows": [{"n": count}]})))
    steps.append(("code_execute", Case({"code": f"print(abs({a} - {b}))"}, str(abs(a - b)))))
    return steps, {
        "product": product,
        "year": year,
        "first": first,
        "second": second,
        "a": a,
        "b": b,
        "gap": abs(a - b),
    }


@chain(
    "list_events",
    "send_message",
    clauses="""
        look up when my {title} is on {day} and tell {recipient} the time
        check my calendar on {day} for the {title}, then message {recipient} when it starts
        ---
        see in my agenda of {day} at what hour the {title} begins and let {recipient} know by chat
    """,
    links="""
        The {title} is at {time}. Telling {recipient}.
        It starts at {time}; sending the message.
        ---
        {time} it is, so {recipient} shall know.
    """,
    answers="""
        Your {title} is at {time}, and I told {recipient}.
        I let {recipient} know that the {title} starts at {time}.
        ---
        {recipient} has been informed: {title}, {time}.
        The {title} begins at {time}; the chat to {recipient} is out.
    """,
)
def event_then_message(rng: Random) -> tuple[Steps, dict[str, Any]]:
    date, recipient = pools.date(rng), pools.person(rng)
    titles, hours = rng.sample(pools.MEETINGS, 3), sorted(rng.sample(range(8, 20), 3))
    rows = [
        {"time": f"{hour:02d}:{rng.choice((0, 15, 30)):02d}", "title": t} for hour, t in zip(hours, titles, strict=True)
    ]
    chosen = rng.choice(rows)
    note = {
        "recipient": recipient,
        "text": f"The {chosen['title']} on {pools.spoken(date)} starts at {chosen['time']}.",
    }
    steps: Steps = [
        ("list_events", Case({"date": date}, {"date": date, "events": rows})),
        ("send_message", Case(note, {"status": "delivered", "time": pools.clock(rng)})),
    ]
    return steps, {"day": pools.spoken(date), "recipient": recipient, **chosen}
