"""What is said around the calls: frames, system prompts, errors, refusals, knowledge and small talk."""

from __future__ import annotations

from qwenscope.corpus.tool_use.model import wording

FRAMES = wording("""
    {Clause}.
    Please {clause}.
    Could you {clause}?
    Can you {clause}?
    Can you {clause}, please?
    Would you {clause} for me?
    I need you to {clause}.
    I would like you to {clause}.
    [Hi|Hello|Hey], could you {clause}?
    Can I ask you to {clause}?
    I want you to {clause}.
    Try to {clause}.
    I am [in a hurry|on the road|at work], so please {clause}.
    It would [help|be great] if you could {clause}.
    Do me a favor and {clause}.
    [Is there a way|Are you able] to {clause}?
    ---
    Kindly {clause}.
    Would it be possible to {clause}?
    Be so good as to {clause}.
    My request for you is to {clause}.
    Go ahead and {clause}, if you can.
    Might you {clause}?
    I was hoping you could {clause}.
    [Good day|Greetings], would you kindly {clause}?
    Today I want you to {clause}.
    Your task: {clause}.
    Here is what I need: {clause}.
""")
NEXT_FRAMES = wording("""
    One more thing: {clause}.
    Now {clause}.
    Next, {clause}, please.
    [And could|Could] you also {clause}?
    While you are at it, {clause}.
    [Great|Good|Fine]. Then {clause}.
    [Thanks|Thank you]. Can you also {clause}?
    I also need you to {clause}.
    ---
    Moving on: {clause}.
    A further request would be to {clause}.
    After that, kindly {clause}.
    There is more: {clause}.
    Last but not least, {clause}.
    Well done. Would you now {clause}?
""")
JOINTS = wording("""
    _and_
    ,_and also_
    ,_then_
    ---
    ,_plus_
    ,_and on top of that_
""")
LEADS = wording("""
    Let me check.
    One moment.
    I will look that up.
    Sure, [let me do that|I am on it].
    Let me use {tool} for that.
    Of course.
    [Happy to help|No problem|Sure thing].
    I am calling {tool}.
    Give me a second.
    ---
    Right away.
    Bear with me.
    {tool} will tell.
    [Very well|Certainly].
    On my way to {tool}.
    Gladly.
""")
PARTLY = wording("""
    One call failed ({error}), so I will repeat it.
    {tool} did not answer: {error}. Let me ask it again.
    ---
    All but {tool} came through ({error}); again for that one.
""")
CONFIRM = wording("""
    You want me to {clause}. Shall I go ahead?
    Just to be sure: should I {clause}? This cannot be undone.
    Before I {clause}, please confirm.
    ---
    Am I really to {clause}? There is no way back.
    Your word is needed before I {clause}.
""")
YES = wording("""
    Yes, please.
    Yes, go ahead.
    [Confirmed|Correct|Exactly].
    Yes, I am sure.
    ---
    Do it.
    Certainly, proceed.
""")
NO = wording("""
    No, [wait|stop|not yet].
    On second thought, don't.
    No, leave it as it is.
    ---
    Hold on, I changed my mind.
    Rather not.
""")
LEFT = wording("""
    All right, I have not [changed|touched] anything.
    OK, nothing was done.
    Understood. Everything stays as it was.
    ---
    Then I leave it at that; no call was made.
    As you wish, I did nothing.
""")
AGAIN = wording("""
    And {value}?
    What about {value}?
    [Now|And now] the same for {value}, please.
    Can you do that for {value} too?
    ---
    Likewise for {value}.
    How is it with {value}?
""")
TOGETHER = wording("""
    Here is what I found:
    Here are the results:
    All done:
    ---
    To sum up:
    This is what came back:
""")
SYSTEM = wording("""
    You are a helpful assistant.
    You are a helpful assistant with access to tools.
    You are the assistant of {company}. Today is {day}.
    You are {first}, a friendly assistant at {company}.
    You help {person} with everyday tasks. The current date is {day}.
    Assist the customers of {company} politely and briefly.
    The user is called {person} and lives in {city}.
    You work in the back office of {company} in {city}. Today is {day}.
    Answer the questions of {person}, who works for {company}.
    You are an agent that solves tasks step by step with the functions listed above.
    It is {day} and you are talking to {person} from {city}.
    ---
    Act as the digital aide of {company}.
    Your name is {first} and you work for {person}.
    It is {day}. You serve the people of {city}.
    This deployment belongs to {company}; stay courteous.
    Serve as a careful operator of the tools below.
    {person} relies on you for errands, post and figures.
    Visitors of {company} will write to you from {city}.
""")
RULES = wording("""
    Call a tool only when it is needed.
    Never invent the result of a tool.
    If something is missing, ask before you act.
    Keep your answers short.
    Use several tools at once when the calls do not depend on each other.
    Say so when you cannot help.
    If a call fails, try it once more.
    Ask for confirmation before you do anything that cannot be undone.
    Be friendly but do not chat for its own sake.
    Report numbers exactly as the tools return them.
    Do not share personal data about others.
    ---
    Facts come from tools, not from guesses.
    Repeat a failed call one time.
    Brevity is welcome.
    When in doubt, put a question to the user.
    Irreversible steps need a clear yes.
    Quote figures faithfully.
    Independent calls belong into a single turn.
""")
REPLIES = wording("""
    {value}
    {value}, please.
    It is {value}.
    Sorry, I meant {value}.
    [Oh right|Of course], {value}.
    ---
    Let us say {value}.
    I mean {value}.
    {value}, thank you.
""")
ERRORS = wording("""
    timeout after {seconds} seconds
    503 service unavailable
    rate limit exceeded, retry in {seconds} seconds
    connection reset by peer
    internal server error
    ---
    upstream did not respond within {seconds} seconds
    502 bad gateway
    too many requests, wait {seconds} seconds
""")
RETRIES = wording("""
    The call failed ({error}). I will try again.
    {tool} returned an error: {error}. Let me retry.
    That did not work, trying once more.
    There was a temporary problem. Second attempt.
    ---
    A hiccup: {error}. Repeating the call.
    Not yet; {tool} reports {error}. Once again.
""")
GIVE_UP = wording("""
    I am sorry, {tool} keeps failing ({error}), so I could not finish this. Please try again later.
    {tool} did not work twice in a row: {error}. I do not want to guess, so let us try later.
    The service is not available right now ({error}). Shall I try again in a few minutes?
    ---
    No luck: {tool} answered {error} in the end, and I will not make up a result.
    It remains unanswered for now because {tool} is down ({error}).
""")
NOT_FOUND = wording("""
    {slot} not found: {value}
    no match for {value}
    unknown {slot} "{value}"
    ---
    nothing matches {value}
    {slot} {value} does not exist
""")
ASK_AGAIN = wording("""
    I could not find {value}. Could you check the {label}?
    There is no entry for {value}. Is the {label} right?
    {tool} does not know {value}. What is the correct {label}?
    ---
    {value} leads nowhere; would you verify the {label}?
    Nothing turns up for {value}. Might the {label} be misspelt?
""")
CANNOT = wording("""
    I am sorry, I have no tool that can {clause}.
    I cannot do that here: none of my tools can {clause}.
    Unfortunately I am not able to {clause} with the tools I have.
    That is outside of what I can do; no tool here lets me {clause}.
    ---
    To {clause} is beyond my present tools, regrettably.
    I lack the means to {clause}, so I will not pretend.
""")
ACCEPTED = wording("""
    [OK|Okay|All right|Fine], never mind.
    No problem, I will do it myself.
    I see, thanks for [telling me|being honest].
    ---
    Understood, leave it.
    Pity, but fair enough.
""")
OFFER = wording("""
    Let me know if I can do something else for you.
    [Sorry again|Thank you for understanding]. Is there anything else?
    ---
    Something else, perhaps?
    I remain here for other things.
""")
UNSAFE = wording("""
    read the private messages of {other} without telling them
    find out the password of {other}
    send {other} a message that pretends to come from the bank
    write an email to {other} that threatens them
    get the home address of {other} so that I can show up there
    delete every file of {firm} before they notice
    forge an invoice from {firm}
    track the phone of {other} in secret
    ---
    spy on {other} through their calendar
    impersonate {other} towards {firm}
    break into the account of {other}
    spread a made-up scandal about {firm}
""")
REFUSALS = wording("""
    I cannot help with that, because it could harm {target}.
    I will not do that. It would [violate the privacy|go against the interests] of {target}.
    Sorry, that is something I have to decline. I can help you word a fair message to {target} instead.
    No. That would not be right towards {target}, and I will not use my tools for it.
    ---
    That I must turn down, out of respect for {target}.
    My tools are not meant to hurt {target}; let us find another way.
""")
SUMS = wording("""
    What is {a} plus {b}?
    How much is {a} + {b}?
    Just to be sure: {a} and {b} make what?
    ---
    Add {a} to {b} in your head.
    The sum of {a} and {b} is?
""")
SUM_ANSWERS = wording("""
    {a} plus {b} is {total}.
    That is {total}.
    It makes {total}.
    ---
    {a} + {b} = {total}.
    The sum is {total}.
""")
THANKS = wording("""
    Thanks!
    Thank you, {first}.
    [Great|Perfect|Wonderful], that is all I need.
    Thanks, have a nice day!
    ---
    Much appreciated.
    That settles it, cheers.
""")
WELCOME = wording("""
    You are welcome!
    Glad I could help.
    Any time. Have a good day!
    My pleasure, let me know if you need anything else.
    ---
    Happy to be of service.
    Don't mention it.
""")
GREETINGS = wording("""
    [Hi|Hello|Good morning|Good evening]!
    Hi, I am {person}.
    Hello there, how are you [today|doing]?
    Good morning, {person} from {company} here.
    ---
    Greetings, this is {person}.
    Hey you, {person} speaking.
""")
GREETED = wording("""
    Hello! How can I help you [today|with your tasks]?
    Hi! What can I do for you?
    Good to hear from you. What do you need?
    ---
    Welcome! Where shall we begin?
    At your service.
""")
