"""Tasks of money: currencies, shares, accounts, loans."""

from __future__ import annotations

from random import Random

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool


@task(
    tool(
        "convert_currency",
        "Convert an amount of money.|Convert between currencies at today's rate.",
        amount="number: Amount to convert",
        source="string: Currency code to convert from",
        target="string: Currency code to convert to",
    ),
    clauses="""
        convert {amount} {source} to {target}
        tell me how much {amount} {source} is in {target}
        work out what {amount} {source} are worth in {target}
        ---
        exchange {amount} {source} into {target} on paper
        express {amount} {source} in {target}
    """,
    answers="""
        {amount} {source} is {converted} {target} at a rate of {rate}.
        At today's rate of {rate}, {amount} {source} gives {converted} {target}.
        That would be {converted} {target}.
        ---
        Rate {rate}: {amount} {source} come to {converted} {target}.
        You would hold {converted} {target} in place of {amount} {source}.
    """,
    gap=(
        """
        convert {amount} {source}
        tell me what {amount} {source} is worth
        ---
        express {amount} {source} in another currency
        """,
        """
        Into which currency?
        Which currency do you need?
        ---
        What currency shall I express it in?
        """,
        "target",
    ),
)
def currency(rng: Random) -> Case:
    source, target = rng.sample(pools.CURRENCIES, 2)
    amount, rate = rng.choice((rng.randint(1, 5000), rng.randint(1, 100) * 50)), rng.randint(20, 3000) / 1000
    result = {"rate": rate, "converted": round(amount * rate, 2)}
    return Case({"amount": amount, "source": source, "target": target}, result)


@task(
    tool(
        "get_stock_price",
        "Get the latest price of a stock.|Quote for a ticker symbol.",
        symbol="string: Ticker symbol",
    ),
    clauses="""
        check the [stock|share] price of {symbol}
        tell me how {symbol} is doing today
        get a quote for {symbol}
        ---
        see where {symbol} trades right now
        pull the last price of {symbol}
    """,
    answers="""
        {symbol} is at {price} USD, {direction} {change} % today.
        The price of {symbol} is {price} USD ({direction} {change} %).
        {symbol} last traded at {price} USD.
        ---
        Shares of {symbol} change hands at {price} USD, {direction} {change} % on the day.
        Right now {symbol} costs {price} USD.
    """,
    gap=(
        """
        check a share price for me
        get a stock quote
        ---
        see where my stock trades right now
        """,
        """
        Which ticker symbol?
        What is the symbol of the stock?
        ---
        Which share do you mean?
        """,
        "symbol",
    ),
    lookup=True,
)
def stock(rng: Random) -> Case:
    symbol, change = rng.choice(pools.TICKERS), rng.randint(1, 79) / 10
    direction = rng.choice(("up", "down"))
    signed = change if direction == "up" else -change
    result = {"symbol": symbol, "price": pools.money(rng, 4, 900), "change_percent": signed}
    return Case({"symbol": symbol}, result, {"change": change, "direction": direction})


@task(
    tool(
        "get_balance",
        "Get the balance of an account.|How much money is in an account.",
        account="checking/savings/business: Account",
    ),
    clauses="""
        check the balance of my {account} account
        tell me how much money is in my {account} account
        ---
        read the state of my {account} account
    """,
    answers="""
        Your {account} account holds {balance} EUR.
        The balance of the {account} account is {balance} EUR.
        There are {balance} EUR in your {account} account.
        ---
        {balance} EUR sit in {account}.
        On {account} you own {balance} EUR.
    """,
    gap=(
        """
        check my balance
        tell me how much money I have
        ---
        read the state of my account
        """,
        """
        Of which account: checking, savings or business?
        Which account?
        ---
        Do you mean checking, savings or business?
        """,
        "account",
    ),
)
def balance(rng: Random) -> Case:
    account = rng.choice(("checking", "savings", "business"))
    return Case({"account": account}, {"account": account, "balance": pools.money(rng, 10, 40000), "currency": "EUR"})


@task(
    tool(
        "transfer_money",
        "Transfer money to a payee.|Send money from the user's account.",
        payee="string: Name of the payee",
        amount="number: Amount in euros",
        reference="string: Purpose of the payment",
    ),
    clauses="""
        transfer {amount} euros to {payee} for the {reference}
        send {payee} {amount} euros, reference {reference}
        pay {payee} {amount} euros for the {reference}
        ---
        wire {amount} euros over to {payee}, subject {reference}
        settle the {reference} with {payee}: {amount} euros
    """,
    answers="""
        {amount} EUR went to {payee} (transaction {transaction}).
        I transferred {amount} EUR to {payee} for the {reference}.
        Paid. The transaction number is {transaction}.
        ---
        {payee} receives {amount} EUR under {transaction}.
        The {reference} is settled: {amount} EUR.
    """,
    careful=True,
)
def transfer(rng: Random) -> Case:
    payee = rng.choice((pools.person(rng), rng.choice(pools.COMPANIES)))
    reference = rng.choice(("rent", "dinner", "invoice", "concert tickets", "membership", "repair", "deposit"))
    amount = rng.randint(5, 900)
    return Case(
        {"payee": payee, "amount": amount, "reference": reference},
        {"status": "done", "transaction": pools.code(rng, "TX")},
    )


@task(
    tool(
        "calculate_loan",
        "Monthly rate of a loan.|Work out what a loan costs per month.",
        principal="number: Sum borrowed in euros",
        annual_rate="number: Interest per year in percent",
        months="integer: Number of monthly payments",
    ),
    clauses="""
        calculate the monthly payment for a loan of {principal} euros at {annual_rate} % over {months} months
        tell me what {principal} euros at {annual_rate} % cost per month over {months} months
        ---
        figure the instalments of {principal} euros borrowed at {annual_rate} % for {months} months
    """,
    answers="""
        You would pay {monthly} EUR per month, {total} EUR in all.
        The monthly payment is {monthly} EUR; over {months} months that adds up to {total} EUR.
        {principal} euros at {annual_rate} % over {months} months cost {monthly} EUR each month.
        ---
        Each instalment is {monthly} EUR, so you pay back {total} EUR.
        {months} times {monthly} EUR, {total} EUR together.
    """,
    gap=(
        """
        calculate the monthly payment for a loan of {principal} euros at {annual_rate} %
        ---
        figure the instalments of {principal} euros borrowed at {annual_rate} %
        """,
        """
        Over how many months?
        How many months will you pay?
        ---
        What is the number of instalments?
        """,
        "months",
    ),
)
def loan(rng: Random) -> Case:
    principal, rate, months = (
        rng.randint(2, 300) * 500,
        pools.tidy(rng.randint(2, 19) / 2),
        rng.choice((12, 24, 36, 48, 60, 120, 240)),
    )
    growth = 1 + rate / 1200
    monthly = round(principal * (growth - 1) / (1 - growth**-months), 2)
    arguments = {"principal": principal, "annual_rate": rate, "months": months}
    return Case(arguments, {"monthly": monthly, "total": round(monthly * months, 2)})
