"""Find the words by which a teacher's trace lets on that its author knew the labels.

A trace is to read as if from the image alone. What gives it away is a closed list of phrases, since
a judgement by another model could not be repeated. Phrases that look alike and speak of the film
itself, as "labelled by an arrow", are in a list of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

from data.labels import CHEXPERT, LABELS, LabelSet

_FINDINGS = ",".join(label.casefold() for label in LABELS)

# Each line stands for all of its phrases: one word or more of every {a,b}, which may be empty.
_LEAKS = f"""
ground truth
the truth {{is,lists,says}}
{{reference,true,actual,correct,official,assigned,confirmed,known,established}} diagnosis
{{expected,target,stated,specified,provided,supplied}} diagnosis
the given {{diagnosis,finding,findings,list,reference,solution}}
{{reference,gold,true,actual,correct}} {{label,labels}}
{{hidden,official,assigned,confirmed,known,established}} {{label,labels}}
{{expected,target,desired,required,stated}} {{label,labels}}
{{specified,listed,given,provided,supplied}} {{label,labels}}
{{positive,present,original}} labels
{{reference,gold,true,correct,right}} {{answer,answers}}
{{expected,desired,required,given,provided,supplied}} {{answer,answers}}
{{reference,true,actual,correct,confirmed,provided,supplied,stated,specified,listed}} findings
{{assigned,target,annotated}} findings
{{provided,supplied,assigned,annotated}} finding
the known {{finding,findings}}
expected output
{{provided,supplied}} {{list,solution,reference,report}}
{{solution,list,information}} {{given,provided,supplied}} {{is,says,states,includes,contains}}
list given
answer key
reference {{standard,report,list}}
gold standard label
the reference {{says,states,lists,reads,shows,mentions,indicates,reports}}
in the reference
{{radiology,original,official}} report
the report {{says,states,mentions,lists,notes,describes,confirms,indicates,reads}}
{{as,was,is,are,were}} {{stated,noted,described,mentioned,listed,given,documented}} in the report
{{according to,per}} {{the,}} {{label,labels,report,reference,annotation,annotations,list,request}}
according to ground truth
labels {{say,state,indicate,include,tell,specify}}
labels {{mention,contain,list,show,suggest,confirm,call for}}
label {{says,states,indicates,includes,tells,specifies}}
label {{mentions,contains,lists,shows,suggests,confirms}}
{{label,labels}} {{given,provided,supplied}}
label {{is,was}} {{given,provided,known}}
labels {{are,were}} {{given,provided,supplied,known}}
findings {{are,were}} {{given,provided}}
findings {{given,provided,supplied,listed}} {{,are,include}}
labels {{marked,that are present,present are}}
label set
{{nih,chexpert,mimic,padchest}} {{label,labels,labeler,labeller,labelled,labeled}}
chexpert
mimic cxr
{{labeler,labeller,annotator,annotators}}
{{since,because,knowing,given,given that,since we know,knowing that}} the {{label,labels,answer}}
with the {{label,labels,answer,answers}} in mind
{{given,knowing}} the diagnosis
{{answer,diagnosis}} is supposed to
as {{given,provided,listed,told,labeled,labelled,instructed}}
as you {{said,noted,told,mentioned,stated,provided,gave,listed}}
you {{said,told,mentioned,provided,gave,stated,listed,have told,have given,have provided}}
i {{was,am,have been}} {{given,provided,told,instructed,asked}}
we {{were,are,have been}} {{given,provided,told,instructed,asked}}
{{was,were,am,are}} instructed
{{labeled,labelled,annotated,flagged,tagged}} as
annotated {{with,for}}
{{labeled,labelled,tagged,flagged}} {{with,}} {{{_FINDINGS}}}
{{labeled,labelled,marked,flagged}} {{as,to be,}} {{present,absent}}
{{tagged,listed,given,stated,noted}} {{as,to be,}} {{present,absent}}
{{labeled,labelled,marked,flagged,tagged,listed}} {{as,}} {{positive,negative}}
listed among the
{{is,are}} {{in,on}} the list
present in the list
the list {{includes,contains,says,states}}
list of {{labels,findings,present findings}} {{includes,contains,says,states,i was,we were,given}}
not rated
the {{annotations,user,prompt}}
the annotation {{says,states,lists,indicates}}
per the annotation
instructions
instruction {{says,states,asks}}
the {{request,question,task}} {{says,states,asks,tells}}
task is to {{justify,support,arrive,explain}}
{{based on,match,matches,matching}} the {{label,labels}}
{{consistent with,agrees with,agree with,in line with}} the {{label,labels}}
{{in keeping with,justify,fits the given,independently of}} the {{label,labels}}
{{indicated,given,stated,confirmed}} by the {{label,labels}}
{{required,specified,suggested,implied,asked for}} by the {{label,labels}}
{{i,we}} {{must,should,need to,have to}} {{conclude,arrive}}
must be included
i must include
{{must,should,need to,have to}} include {{{_FINDINGS}}}
{{need,have,asked}} to justify
{{pretend,pretending}}
{{as if,as though}} i
as if independently
without {{knowing the,revealing}}
{{i,we}} {{should,must,can,may}} not {{mention,reveal}}
do not {{mention,reveal that}}
{{working,work,reasoning,reason}} {{backward,backwards}} from
in retrospect given
hindsight
{{metadata,dataset,data set}}
for {{me,you}} alone
known to be present
it is known that {{{_FINDINGS}}}
known that this {{patient,image,film,study}}
{{we,i}} know {{that,that the,}} {{labels,label,{_FINDINGS}}}
already know
it {{is,was}} {{stated,given}} that
"""

# What a radiologist says of the film. A leak inside one of these phrases is none.
_INNOCENT = """
as {labeled,labelled} {by,on,at} {the,an,a,its} {arrow,arrows,marker}
as {labeled,labelled} {by,on,at} {the,an,a,its} {side marker,technologist,film,top}
{labeled,labelled} as {ap,pa,portable,supine,erect,upright,sitting}
{labeled,labelled} as {semi,lateral,frontal,left,right,l,r}
{labeled,labelled} as {an ap,a pa,a portable,a supine,an erect,an upright,a lateral,a frontal}
as {given,provided,listed} {above,below,before,by}
the annotations {in,at,on,along,near,of the}
the annotations are burned
the user of
"""


def _phrases(lines: str) -> Iterator[tuple[str, ...]]:
    """Write out every phrase of the lines, as words."""
    for line in lines.split("\n"):
        parts = [part.split("}") for part in line.split("{")]
        choices = [[parts[0][0]]]
        for inside, after in parts[1:]:
            choices += [inside.split(","), [after]]
        for chosen in product(*choices):
            if words := tuple("".join(chosen).split()):
                yield words


@lru_cache(maxsize=8)
def _leak_words(label_set: LabelSet) -> frozenset[tuple[str, ...]]:
    """Write out the phrases, with the names of these labels where a finding stands in them."""
    findings = ",".join(_folded(label) for label in label_set.names)
    return frozenset(_phrases(_LEAKS.replace(_FINDINGS, findings)))


def _folded(text: str) -> str:
    """Fold a text to its words in small letters, parted by blanks."""
    text = text.casefold().replace("'", "").replace("\u2019", "")
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


_INNOCENT_WORDS = frozenset(_phrases(_INNOCENT))
LEAK_PHRASES: tuple[str, ...] = tuple(sorted(" ".join(words) for words in _leak_words(CHEXPERT)))


def leak(text: str, label_set: LabelSet = CHEXPERT) -> str | None:
    """Find the first of LEAK_PHRASES in a text, the longest of those that begin there, or None.

    label_set: the findings of the phrases.

    Compared word by word, whatever the case and the punctuation: "ground truth" is also found in
    "Ground-truth:".
    """
    words = _folded(text).split()
    innocent = list(_found(words, _INNOCENT_WORDS))
    for start, end in _found(words, _leak_words(label_set)):
        if not any(first <= start and end <= last for first, last in innocent):
            return " ".join(words[start:end])
    return None


def _found(words: list[str], phrases: frozenset[tuple[str, ...]]) -> Iterator[tuple[int, int]]:
    """Find phrases among words -> (start, end) of each, by their starts, the longest first."""
    longest = max(map(len, phrases))
    for start in range(len(words)):
        for end in range(min(len(words), start + longest), start, -1):
            if tuple(words[start:end]) in phrases:
                yield start, end
