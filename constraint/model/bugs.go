package model

// Bug is a set of rules that are switched off.
type Bug uint64

func (b Bug) has(x Bug) bool { return b&x != 0 }

// The rules that can be broken, each alone.
const (
	NoFence Bug = 1 << iota
	LateFence
	FinishWithoutFence
	SaveIgnoresFences
	SaveChecksEarly
	FenceOfOtherUUID
	FenceReplaced
	FenceIgnoresEpoch
	FenceTooWide
	GrantSurvivesFailover
	GrantSurvivesPurge
	GrantKeepsOddVersion
	QuestionBeforeBegin
	SourcesNotAsked
	AcceptIgnoresVersion
	AcceptIgnoresEpoch
	AcceptIgnoresUUID
	AcceptIgnoresBlockades
	AcceptIgnoresSources
	EpochAfterPlan
	BlockersCountAsChecked
	NoSuspects
	SuspectsNotTold
	SweepBringsNothing
	SweepVoidsNothing
	EstablishWhileDeleting
	EstablishWithoutSource
	LowerAttemptReplaces
	ConfirmDropsAll
	ExpiryDropsSource
	PruneIgnoresVersion
	PruneIgnoresEpoch
	FinishAsksNobody
	FinishIgnoresEpoch
	ReuseWhileDeleting
	NewsWithoutUUID
	HandlerLooksOnce
	AnswersNotDurable
	MarkAfterGrant
	ExpiredBlocks
	PruneByOlderAnswer
	OldSweepCompletes
	lastBug = OldSweepCompletes
)

// Mutant is the protocol with one rule switched off, and the world in which that must be found.
type Mutant struct {
	Bug   Bug
	Name  string // says what is wrong
	World string
}

// Mutants returns the planted bugs.
func Mutants() []Mutant {
	return []Mutant{
		{NoFence, "a negative answer leaves no fence", "two-block"},
		{LateFence, "answer and fence are two transactions", "two-block"},
		{SaveIgnoresFences, "a save does not look for fences", "two-block"},
		{SaveChecksEarly, "a save checks its grant before the transaction that commits", "two-block"},
		{SourcesNotAsked, "a deletion asks nobody", "two-block"},
		{EstablishWithoutSource, "a grant leaves a blockade, but no source", "two-block"},
		{AcceptIgnoresBlockades, "the last transaction of a deletion does not read blockades again", "async-and-block"},
		{AcceptIgnoresSources, "the last transaction of a deletion does not read sources again", "two-block"},
		{QuestionBeforeBegin, "a deletion asks before it makes the row version odd", "two-block"},

		{GrantKeepsOddVersion, "a grant does not make an odd row version even", "two-deletions"},
		{AcceptIgnoresVersion, "the last transaction of a deletion does not compare the row version", "two-deletions"},
		{FenceTooWide, "a fence voids the grants that follow it", "two-deletions"},

		{EstablishWhileDeleting, "references to a target that is being deleted are granted", "join"},
		{FinishAsksNobody, "a deletion is finished although subscribers have not been asked", "async-and-block"},
		{FinishWithoutFence, "a subscriber that has no reference left leaves no fence", "async-and-block"},
		{HandlerLooksOnce, "a subscriber looks for referrers only when the news arrives", "async-and-block"},

		{ExpiredBlocks, "a blockade blocks after it has expired", "two-block"},
		{ExpiryDropsSource, "an expired blockade takes the source along, and nobody is asked", "expiry"},
		{PruneIgnoresVersion, "a source is pruned although something was granted since the question", "expiry"},
		{PruneByOlderAnswer, "a source of a target that is being deleted is pruned by an answer from before", "one-deployment"},

		{LowerAttemptReplaces, "a late lower attempt replaces a higher one", "late-messages"},
		{ConfirmDropsAll, "a confirmation drops the blockades of other transactions of the referrer", "late-messages"},

		{FenceOfOtherUUID, "fences of an earlier incarnation void grants", "recreation"},
		{FenceReplaced, "the fence of a new incarnation replaces that of the old", "recreation"},
		{ReuseWhileDeleting, "a name is used again while its deletion is not finished", "recreation"},
		{NewsWithoutUUID, "news of a deletion does not say which incarnation", "recreation"},
		{AcceptIgnoresUUID, "the last transaction of a deletion does not compare the uuid", "recreation-block"},

		{NoSuspects, "after a failover of the owner nobody is suspect", "owner-fails"},
		{EpochAfterPlan, "a deletion reads the epoch that it compares after it has read who is suspect", "owner-fails"},
		{SweepVoidsNothing, "grants of an older epoch of the owner are committed behind the sweep", "owner-fails"},
		{SweepBringsNothing, "a sweep completes the epoch, but its sources are not written", "owner-fails"},
		{FenceIgnoresEpoch, "fences compare row versions without epochs", "owner-fails-deletions"},
		{AcceptIgnoresEpoch, "the last transaction of a deletion compares the row version without the epoch", "owner-fails-deletions"},
		{PruneIgnoresEpoch, "pruning compares the row version without the epoch", "owner-fails-deletions"},
		{OldSweepCompletes, "a sweep of an older epoch completes the present one", "owner-fails-twice"},
		{SuspectsNotTold, "suspects do not keep the shadow of a deleted target", "owner-fails-async"},
		{FinishIgnoresEpoch, "a deletion is finished with answers from before the failover", "owner-fails-async"},
		{BlockersCountAsChecked, "a source that only blocked when the handler began counts as checked", "owner-fails-mixed"},

		{GrantSurvivesFailover, "a grant survives the failover of its own database", "referrer-fails"},
		{MarkAfterGrant, "a save notes where its own database stands only when it has the grant", "referrer-fails"},
		{AnswersNotDurable, "a negative answer is sent before it would survive a failover", "referrer-fails-durable"},
		{GrantSurvivesPurge, "a grant survives the purge of fences", "purge"},
	}
}
