"""What the assistant knows without a tool: `question => answer` lines, true and of lasting kind."""

from __future__ import annotations

from qwenscope.corpus.tool_use.model import wording

FACTS = wording("""
    What is the capital of Norway? => The capital of Norway is Oslo.
    What is the capital of Kenya? => Nairobi is the capital of Kenya.
    Which city is the capital of Vietnam? => That is Hanoi.
    What is the capital of Peru? => Lima is the capital of Peru.
    What is the capital of Estonia? => Tallinn.
    How many minutes are in a day? => A day has 1,440 minutes: 24 hours of 60 minutes each.
    Which planet is the largest? => Jupiter is the largest planet of the solar system.
    Which planet is closest to the Sun? => Mercury is the closest planet to the Sun.
    At what temperature does water boil at sea level? => At sea level water boils at 100 °C, or 212 °F.
    Who wrote Pride and Prejudice? => Jane Austen wrote it; it was published in 1813.
    Who painted the Mona Lisa? => Leonardo da Vinci painted it in the early sixteenth century.
    What does CPU stand for? => CPU stands for central processing unit.
    What does HTTP stand for? => HTTP stands for Hypertext Transfer Protocol.
    How many continents are there? => By the usual count there are seven continents.
    What is photosynthesis? => Plants use light to turn water and carbon dioxide into sugar and oxygen.
    What is the square root of 144? => The square root of 144 is 12.
    Why is the sky blue? => Air scatters the short blue wavelengths of sunlight more than the long red ones.
    What is a prime number? => A prime is a whole number above 1 with no divisors but 1 and itself.
    What is the chemical formula of water? => It is H2O: two hydrogen atoms and one oxygen atom.
    How many bits are in a byte? => A byte has eight bits.
    Which is the longest bone of the human body? => The thigh bone, called the femur.
    What causes the tides? => Mostly the gravity of the Moon, and to a lesser degree that of the Sun.
    What is a haiku? => A haiku is a short Japanese poem, commonly of five, seven and five syllables.
    How do weather and climate differ? => Weather is what happens now; climate is its average over decades.
    How fast does light travel? => About 299,792 kilometers per second in a vacuum.
    What is inflation? => A general rise of prices, so that the same money buys less.
    What is an API? => An interface through which one program uses the functions of another.
    Why do leaves turn yellow in autumn? => The green chlorophyll breaks down, and yellow pigments become visible.
    What is a leap year? => A year with 366 days; February then has 29 days.
    Who developed the theory of general relativity? => Albert Einstein, who published it in 1915.
    What does a thermostat do? => It switches heating or cooling so that a set temperature is kept.
    What is the plural of mouse? => The animals are called mice.
    How many strings does a violin have? => A violin has four strings.
    What is the opposite of north? => South is the opposite of north.
    How are you? => I am doing well, thank you. What can I do for you?
    Are you a human? => No, I am a computer program that can answer questions and use tools.
    Can you keep a secret? => I can be discreet, but please do not tell me passwords or other secrets.
    What can you do? => I can answer questions and use the tools I was given, for example to look things up.
    Do you ever sleep? => No, I am around whenever you need me.
    Tell me something nice. => You are making good progress today, and that is worth a smile.
    Give me a tip for better sleep. => Keep regular hours and put screens away an hour before bed.
    How do I learn a language faster? => Practise a little every day and speak from the start.
    Suggest a name for a cat. => How about Pepper?
    What should I drink when it is cold? => A hot ginger tea warms well.
    ---
    What is the capital of Portugal? => Lisbon is Portugal's capital.
    How many sides does a hexagon have? => Six sides.
    What gas do we breathe in to live? => Oxygen, which makes up about 21 % of the air.
    What is the chemical symbol of gold? => Gold has the symbol Au.
    Who wrote Hamlet? => William Shakespeare, around the year 1600.
    What is the freezing point of water? => Water freezes at 0 °C, which is 32 °F.
    How many weeks are in a year? => A year has 52 weeks and one day, or two in a leap year.
    What do bees make? => Honey and wax.
    What does RAM mean in a computer? => Random access memory, the working memory of a computer.
    How is your day going? => Splendidly, since you ask. And yours?
    Will you get bored of me? => Never; every request is welcome.
    Recommend a hobby to me. => Watching birds asks for little and gives a lot.
""")
