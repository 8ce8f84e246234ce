"""Protect the list of phrases by which a teacher's trace lets on that the labels were known.

A leak that passes teaches the student to speak of labels that it will not be given. A false alarm
costs a good trace. Both tables were written before the phrases.

Run: pytest tests/data/test_leaks.py
"""

from __future__ import annotations

import pytest

from data.leaks import LEAK_PHRASES, leak

LEAKS = """
As the label says, there is edema.
The label says pneumonia.
The labels say edema and effusion.
The labels tell us that there is edema.
The label tells me to look for a fracture.
Given labels: Edema, Fracture.
Given the labels, I look for edema.
Given the label Edema, the haze must be fluid.
Given the label of Edema, I describe septal lines.
Given that the label is Edema, I describe septal lines.
With the labels in mind, the haze is edema.
Knowing the labels, I can describe edema.
Knowing that the answer is Edema, I look for septal lines.
Since the answer is Edema, I describe septal lines.
Since the label is Fracture, a step must be there.
Because the labels include Fracture, I search the ribs.
The ground truth lists edema.
The ground-truth labels are Edema.
According to ground truth, edema is present.
The reference report lists edema.
The reference report says edema.
The reference says edema is present.
The reference lists cardiomegaly.
The reference diagnosis is edema.
The reference answer is Edema.
The reference findings are edema.
Per the reference, edema is present.
According to the reference, there is edema.
The reference standard is Edema.
The report lists a small effusion.
The report notes a small effusion.
The report describes edema.
According to the radiology report, there is edema.
As stated in the report, there is edema.
As the report says, there is edema.
The radiology report mentions cardiomegaly.
The original report confirms the effusion.
As given, edema is present.
As given in the labels, edema is present.
As provided, the findings are edema.
As provided in the request, edema is present.
As listed, edema is present.
The list given includes fracture.
The given list includes fracture.
The list of findings I was given includes fracture.
The list of labels includes fracture.
The list of present findings includes fracture.
The findings listed are edema and fracture.
The listed findings are edema and fracture.
The listed labels are edema and fracture.
The findings given are edema.
The findings provided are edema.
I was given edema as a finding.
I am given that edema is present.
I was provided with the diagnosis.
We are given edema.
We are told that edema is present.
You said that edema is present.
You mentioned edema as present.
You have told me that edema is present.
As you said, edema is present.
As you noted, edema is present.
As told, edema is present.
As indicated by the labels, edema is present.
The annotation says edema.
The annotations list edema.
The annotated findings are edema.
The image is annotated with edema.
Annotators marked edema.
The image is labeled with edema.
The image is labeled Edema.
This image was labeled positive for edema.
The study is labelled as edema.
The case is tagged as pneumonia.
This case is marked as positive for pneumonia.
The target labels are Edema.
The target diagnosis is edema.
The expected output is Edema.
The expected diagnosis is edema.
The desired answer is Edema.
The required labels are Edema.
The required answer is Edema.
The answer is supposed to be Edema.
I must conclude Edema.
I need to conclude with Edema.
I have to include Edema.
I should include Edema in the solution because it is present in the list.
I need to arrive at Edema.
We need to arrive at exactly the labels present.
To match the expected labels, I add fracture.
This matches the provided diagnosis.
This agrees with the labels.
This is in line with the labels.
This is consistent with the given diagnosis.
This fits the given label.
This supports the assigned label.
The assigned labels are edema.
The assigned diagnosis is edema.
The confirmed labels are edema.
The confirmed diagnosis is edema.
The established diagnosis is edema.
The known findings are edema.
The known finding of edema is supported by haze.
The true findings are edema.
The true diagnosis is edema.
The actual labels are edema.
The actual diagnosis is edema.
The correct diagnosis is edema.
The correct findings are edema.
The right answer is Edema.
The official label is edema.
The official report says edema.
The hidden labels are edema.
The stated findings are edema.
The stated diagnosis is edema.
The specified findings are edema.
The specified labels are edema.
The labels specify edema.
The positive labels are edema.
The labels present are edema.
The labels that are present are edema.
Labels marked present: edema.
Edema is marked present.
Edema is marked as present.
Edema is listed as present.
Edema is listed among the findings.
Edema is stated to be present.
Edema is given as present.
Edema is in the list.
Edema is flagged as positive.
Edema is labeled positive.
Edema is labelled present.
Edema is noted as present in the reference.
Fracture is listed as absent.
Fracture is marked absent.
Pneumonia is not rated.
The label set contains edema.
The labels contain edema.
The labels mention edema.
The labels show edema.
The label suggests edema.
The label confirms edema.
The labels call for edema.
Following the instructions, I do not mention it.
The instruction says to conclude with edema.
The prompt says edema is present.
The request states edema.
The question says edema is present.
The task says edema.
The task is to justify edema.
I am asked to reason to edema.
We have been asked to support edema.
I will write as though I saw only the image.
I will act as if I did not know.
I will pretend to see only the image.
Without revealing that the labels are known, I reason.
I should not reveal that I know the labels.
I should not mention the labels.
Do not mention the labels, so I describe the haze.
Working backwards from the diagnosis, I look for haze.
Reasoning backward from the label, the haze is edema.
In retrospect, given the label, the haze is edema.
With hindsight the haze is edema.
The metadata says AP.
The dataset labels this as edema.
In this dataset edema is common.
The CheXpert labels say edema.
The CheXpert labeler gives edema.
The NIH label is infiltration.
MIMIC labels this as edema.
For me alone, the truth is edema.
The truth is Edema.
The gold answer is edema.
The solution given is edema.
The provided solution is edema.
The provided reference is edema.
The provided ground truth is edema.
The information given says edema.
The information provided says edema.
The supplied findings are edema.
The supplied diagnosis is edema.
It is stated that edema is present.
It was given that edema is present.
It is known that edema is present.
It is known that this patient has edema from the labels.
Since edema is known to be present, the haze is fluid.
We know edema is present.
I know that edema is present.
I already know the diagnosis is edema.
We already know the labels.
"""

INNOCENT = """
The given film is rotated.
The film given is of poor quality.
As labelled by the arrow marker, the tube ends above the carina.
As labeled by the arrow, the tip lies in the vena cava.
The R marker labels the side.
The side is labelled by an R marker.
The side marker is labeled L.
The marker labelled R lies at the top left.
The film is labelled PORTABLE.
The film is labelled as portable.
The image is labeled as AP by the technologist's marker.
The image is labelled AP SUPINE in the corner.
The radiograph is marked as supine by the annotation in the corner.
A metallic marker is marked R.
The annotation at the top says PORTABLE.
The annotation ERECT is burned in.
A burned-in annotation marks the side.
The annotations in the corner mark the side.
Given the AP projection, the heart may look large.
Given the low lung volumes, vascular crowding is expected.
Given the rotation, the mediastinum is hard to judge.
Given that the lung volumes are low, crowding is expected.
Given these findings, edema is likely.
Given findings of cephalization, edema is likely.
Given the finding of septal lines, edema is likely.
Given the presence of an effusion, I look for consolidation.
Given the appearance, an effusion is likely.
With the findings in mind, edema is most likely.
These findings are consistent with edema.
This is consistent with the diagnosis of edema.
The findings are in line with congestion.
The findings match an interstitial pattern.
The appearance matches that of edema.
This fits a diagnosis of edema.
This agrees with the impression of congestion.
The most likely diagnosis is edema.
The correct position of the tube is above the carina.
The correct level of the tip is the cavoatrial junction.
The expected position of the carina is at T5.
The expected course of the vessel is seen.
The expected location of the tip is the cavoatrial junction.
As expected, the stomach bubble lies on the left.
The actual heart size may be overestimated.
The true heart size cannot be judged on AP films.
The true pleural line is not seen.
The known pitfall is a skin fold.
A well known mimic is the skin fold.
It is known that AP films magnify the heart.
It is well known that low volumes crowd the vessels.
We know that AP films magnify the heart.
The reference point is the carina.
With reference to the carina, the tube is high.
With reference to the spine, the trachea is midline.
The reference line is drawn from the dome.
For reference, the thoracic width is twice that of the heart.
The provided view is frontal.
The image provided is a frontal radiograph.
The provided image shows both lungs.
The image given is a frontal radiograph.
The given image is a frontal radiograph.
The given view is frontal.
The given projection is AP.
The given exposure is adequate.
A line is provided with its tip in the vena cava.
Support is provided by sternal wires.
Contrast is provided by air in the stomach.
The target sign is not seen.
The target lung zone is the base.
The target position of the tube is 4 cm above the carina.
Positive findings are haze and septal lines.
The positive findings are edema and effusion.
The findings are listed from top to bottom.
I list the findings by zone.
The label Edema is supported by the septal lines.
The label Pneumothorax is ruled out.
The labels Edema and Cardiomegaly apply.
The labels that apply are Edema and Cardiomegaly.
The labels supported by the image are Edema.
I choose the label Edema.
Of the labels, only Edema fits.
None of the other labels applies.
I go through the labels one by one.
Going through the list, there is no fracture.
Each label is checked in turn.
The answer is Edema.
My answer is Edema.
The final answer is Edema.
The final labels are Edema.
The final diagnosis is edema.
So the labels are Edema and Cardiomegaly.
The label for this image is Edema.
A report would call this mild edema.
I would report mild edema.
In a report one would mention the haze.
I would state in the report that the heart is large.
Impression: mild edema.
The impression supports edema.
The question is whether the haze is fluid.
The question of a small effusion remains.
The task is to look for fractures too.
The first step is the review of quality.
In retrospect the line is a skin fold.
In retrospect, the same line continues outside the chest.
The appearance is as if the lung were covered by a veil.
It looks as though the hemidiaphragm were missing.
The user of a film must look behind the heart.
The patient is marked by kyphosis.
The degenerative changes are marked.
Marked cardiomegaly is present.
Marked as it is, the scoliosis distorts the mediastinum.
The haze is marked at the bases.
The effusion is noted as a meniscus.
An effusion is noted on the left.
Edema is present.
Edema is stated with confidence.
Fracture is absent.
There is no listed hardware recall.
The silhouette is true to size on PA films.
The truth of this sign depends on the projection.
The standard signs of edema are seen.
The gold coloured clip is a foreign body.
A fiducial marker, known as a gold seed, is seen.
The established sign of a meniscus is present.
The assigned lung zones are reviewed one after another.
The official naming of the lines is kept.
The required inspiration is reached with ten ribs.
I need to look behind the heart.
I have to include the apices in the search.
I must not forget the bones.
I should include the ribs in the review.
The data are those of a single frontal view.
The set of findings suggests failure.
A data point outside the film cannot be judged.
Old films are not provided.
No clinical information is given.
No history was given.
No prior studies are provided.
No lateral view was provided.
The information in a single view is limited.
The text annotation in the corner is not anatomical.
The pacemaker's label cannot be read.
A label on the tube can be seen as a dense stripe.
The ECG electrodes are labelled with small discs.
The tube is listed to the right.
The mediastinum lists to the right.
The report of the technologist is burned in at the bottom.
The haze was said to be gravitational by its gradient.
One is told by the meniscus that the fluid is free.
You can see the meniscus on the left.
As you move laterally, the vessels taper.
As noted above, the heart is large.
As mentioned above, the volumes are low.
As stated above, the heart is large.
As described, the base is hazy.
As listed above, the signs are three.
As indicated by the meniscus, the fluid is free.
As shown by the meniscus, the fluid is free.
This is confirmed by the meniscus.
The meniscus confirms the effusion.
The diagnosis is supported by the meniscus.
The confirmed sign is the meniscus.
The stated sign is subtle.
The specific findings are septal lines.
"""


@pytest.mark.parametrize("text", LEAKS.strip().splitlines())
def test_what_lets_on_that_the_labels_were_known(text):
    assert leak(f"Both bases are hazy. {text} The heart is wide.") is not None


@pytest.mark.parametrize("text", INNOCENT.strip().splitlines())
def test_what_is_said_of_the_film_and_of_ones_own_labels(text):
    assert leak(f"Both bases are hazy. {text} The heart is wide.") is None


def test_every_phrase_is_found_in_whatever_dress():
    assert len(LEAK_PHRASES) == len({*LEAK_PHRASES}) > 900
    for phrase in LEAK_PHRASES:
        for dressed in (
            phrase,
            phrase.upper(),
            phrase.title().replace(" ", "-"),
            phrase.replace(" ", " \n"),
            phrase.replace(" ", " \u201c", 1),
        ):
            assert leak(f"The lungs are hazy ({dressed}).") is not None, dressed
        first, *rest = phrase.split()
        # whole words only
        assert leak("The lungs: " + " ".join([f"un{first}", *rest])) != phrase


def test_the_longest_phrase_that_begins_first_is_named():
    assert leak("Edema was given. As labeled, the labels are given.") == "as labeled"
    assert leak("The radiology report says so, as instructed.") == "radiology report"
    assert leak("The labels are known.") == "labels are known"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("As labelled by the arrow, the tip is low.", None),
        ("As labelled by the radiologist, there is edema.", "as labelled"),
        ("The film is labeled as portable.", None),
        ("The film is labeled as pneumonia.", "labeled as"),
        ("The user of a film is careful.", None),
        ("The user asks for edema.", "the user"),
        # an innocent phrase does not cover a leak elsewhere
        ("As labelled by the arrow, and as labelled, it is edema.", "as labelled"),
    ],
)
def test_an_innocent_phrase_covers_what_lies_in_it_alone(text, found):
    assert leak(text) == found


@pytest.mark.parametrize(
    "text",
    [
        (
            "The heart is enlarged on this AP projection. Given findings of consolidation with air"
            " bronchograms, pneumonia is likely."
        ),
        (
            "The side marker is labeled L, and the annotation PORTABLE is seen at the top. No"
            " pneumothorax."
        ),
        "A right internal jugular line is provided with its tip in the superior vena cava.",
        (
            "12. Impression: the label Edema is supported; Pneumothorax is ruled out by visible"
            " markings to the chest wall."
        ),
        "Cardiomegaly | heart wider than half of the chest | AP projection | 80",
        (
            "The reference point is the carina. A known pitfall is the skin fold, which is not a"
            " true pleural line."
        ),
        (
            "It is as if the left hemidiaphragm were missing behind the heart: a user of the film"
            " must look there."
        ),
        (
            "The correct position of the tube tip is above the carina. I would expect labelled"
            " fluid levels here."
        ),
    ],
)
def test_what_a_radiologist_may_say(text):
    assert leak(text) is None
