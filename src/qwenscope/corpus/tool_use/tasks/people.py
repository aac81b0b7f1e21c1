"""Tasks of reaching people: mail, messages, contacts, tickets."""

from __future__ import annotations

from random import Random

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool


@task(
    tool(
        "send_email",
        "Send an email.|Send a message to one recipient by email.",
        to="string: Address of the recipient",
        subject="string: Subject line",
        body="string: Text of the message",
    ),
    clauses="""
        [email|write to] {to} about the {topic} and say "{body}"
        send {to} an email with the text "{body}" about the {topic}
        let {to} know by email: "{body}" (it is about the {topic})
        ---
        drop {to} a line on the {topic} that reads "{body}"
        mail "{body}" to {to}, subject {topic}
    """,
    answers="""
        The email to {to} has been sent (message {message_id}).
        Done, {to} will get your message about the {topic}.
        I sent your note on the {topic} to {to}.
        ---
        {to} has mail; the reference is {message_id}.
        Your line about the {topic} is on its way to {to}.
    """,
    gap=(
        """
        send an email about the {topic} that says "{body}"
        write a quick mail on the {topic}: "{body}"
        ---
        drop someone a line on the {topic} that reads "{body}"
        """,
        """
        What is the recipient's address?
        Who should receive it?
        ---
        To which address shall it go?
        """,
        "to",
    ),
)
def mail(rng: Random) -> Case:
    topic = rng.choice(pools.MEETINGS)
    body = rng.choice(
        ("See you at {0}.", "I will be late, around {0}.", "It starts at {0} now.", "Can we move it to {0}?")
    )
    arguments = {
        "to": pools.email(pools.person(rng)),
        "subject": topic.capitalize(),
        "body": body.format(pools.clock(rng)),
    }
    return Case(arguments, {"status": "sent", "message_id": pools.code(rng, "MSG")}, {"topic": topic})


@task(
    tool(
        "find_contact",
        "Look up a person in the address book.|Search contacts by name.",
        name="string: Full name",
    ),
    clauses="""
        look up {name} in my contacts
        find the [email address|phone number] of {name}
        get me the contact details of {name}
        ---
        pull {name} from the address book
        see how I can reach {name}
    """,
    answers="""
        {name} works at {company}; the email is {email} and the phone number is {phone}.
        You can reach {name} ({company}) at {email} or {phone}.
        The address book lists {name} with {email} and {phone}.
        ---
        For {name} of {company} I have {phone} and {email}.
        {email} or {phone} will get you to {name}.
    """,
    gap=(
        """
        look someone up in my contacts
        find a phone number for me
        ---
        pull an entry from the address book
        """,
        """
        Whose details do you need?
        What is the person's name?
        ---
        Whom are you looking for?
        """,
        "name",
    ),
    lookup=True,
)
def contact(rng: Random) -> Case:
    name = pools.person(rng)
    result = {
        "name": name,
        "company": rng.choice(pools.COMPANIES),
        "email": pools.email(name),
        "phone": pools.phone(rng),
    }
    return Case({"name": name}, result)


@task(
    tool(
        "send_message",
        "Send a chat message to a colleague.|Send a direct message.",
        recipient="string: Full name of the recipient",
        text="string: The message",
    ),
    clauses="""
        message {recipient}: "{text}"
        tell {recipient} "{text}"
        send {recipient} a message saying "{text}"
        ---
        pass "{text}" on to {recipient} by chat
        ping {recipient} with "{text}"
    """,
    answers="""
        I sent "{text}" to {recipient}.
        {recipient} got your message at {time}.
        Your message to {recipient} was delivered.
        ---
        {time}: {recipient} was pinged.
        "{text}" has been passed on to {recipient}.
    """,
    gap=(
        """
        send someone this message: "{text}"
        ---
        pass "{text}" on by chat
        """,
        """
        Who should get it?
        To whom?
        ---
        Who is it meant for?
        """,
        "recipient",
    ),
    lookup=True,
)
def message(rng: Random) -> Case:
    words = (
        "Running late, start without me.",
        "The slides are ready.",
        "Lunch at {0}?",
        "Can you call me at {0}?",
        "Moved to {0}.",
    )
    arguments = {"recipient": pools.person(rng), "text": rng.choice(words).format(pools.clock(rng))}
    return Case(arguments, {"status": "delivered", "time": pools.clock(rng)})


@task(
    tool(
        "create_ticket",
        "Open a support ticket.|Report a problem to the support team.",
        title="string: Short description",
        priority="low/medium/high/urgent: Priority",
    ),
    clauses="""
        open a {priority} priority ticket: {title}
        create a ticket saying that {title}, priority {priority}
        report to support that {title} ({priority} priority)
        ---
        file a complaint of {priority} priority that {title}
        raise it with support, {priority}: {title}
    """,
    answers="""
        I opened ticket {ticket} ({priority}): {title}.
        Ticket {ticket} has been created; {team} will look into it.
        Your ticket number is {ticket}.
        ---
        {team} took it up as {ticket}.
        Filed under {ticket} with {priority} priority.
    """,
    gap=(
        """
        open a ticket: {title}
        report to support that {title}
        ---
        file a complaint that {title}
        """,
        """
        What priority should it have?
        How urgent is it: low, medium, high or urgent?
        ---
        Which priority applies?
        """,
        "priority",
    ),
)
def ticket(rng: Random) -> Case:
    thing = rng.choice(
        ("printer", "projector", "badge reader", "coffee machine", "VPN", "lift", "scanner", "heating", "door lock")
    )
    trouble = rng.choice(("is broken", "does not start", "makes noise", "is stuck"))
    title = f"the {thing} on floor {rng.randint(1, 20)} {trouble}"
    arguments = {"title": title, "priority": rng.choice(("low", "medium", "high", "urgent"))}
    return Case(arguments, {"ticket": pools.code(rng, "TCK"), "team": f"Team {rng.choice(pools.LAST_NAMES)}"})


tool(
    "ask_user",
    "Ask the user a question and return the reply.|Get missing information from the user.",
    question="string: Question for the user",
)
