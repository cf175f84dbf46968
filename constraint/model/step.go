package model

import "fmt"

// Step is one atomic step of a trace: what happened, where, to which referrer, transaction, attempt or task.
type Step struct {
	op          op
	r, i, k     int
	tx, attempt uint8
}

type op uint8

const (
	opBegin op = iota
	opEstablish
	opEstablishUnheard
	opRefuse
	opReceive
	opCheck
	opCommit
	opVoid
	opCrashSave
	opExpire
	opConfirm
	opConfirmUnheard
	opRemove
	opPlan
	opPlanPrune
	opMark
	opGiveUp
	opAsk
	opAnswer
	opFence
	opRefused
	opChanged
	opAccept
	opPrune
	opCrashTask
	opHear
	opHandle
	opFinisher
	opCheckSubscriber
	opFinisherReads
	opFinish
	opRecreate
	opJoin
	opOwnerStandby
	opOwnerFails
	opHomeStandby
	opHomeFails
	opSweep
	opSweepPage
	opSwept
	opPurge
	ops
)

// In the texts, R is the Deployment and f the referrer in it, k the task, t the transaction, a its attempt.
var texts = map[op]string{
	opBegin:            "{R}{f} begins a transaction and asks the owner for a reference",
	opEstablish:        "the owner grants {R}{f} the reference (transaction {t}, attempt {a})",
	opEstablishUnheard: "the owner takes a request of {R}{f} (transaction {t}, attempt {a}), and nobody hears the answer",
	opRefuse:           "the owner refuses {R}{f} the reference: the target is being deleted",
	opReceive:          "{R}{f} receives the grant",
	opCheck:            "{R}{f} checks its grant, and has yet to commit",
	opCommit:           "{R}{f} commits transaction {t}",
	opVoid:             "{R}{f} finds its grant void",
	opCrashSave:        "{R}{f} crashes before the commit",
	opExpire:           "the blockade of {R}{f} expires (transaction {t})",
	opConfirm:          "{R}{f} confirms transaction {t}",
	opConfirmUnheard:   "the owner takes a confirmation of {R}{f} (transaction {t}), and nobody hears the answer",
	opRemove:           "a user takes the reference out of {R}{f}",
	opPlan:             "task {k} plans a deletion: it reads sources, suspects and blockades",
	opPlanPrune:        "task {k} sees an expired blockade of {R}",
	opMark:             "task {k} makes the row version odd",
	opGiveUp:           "task {k} finds nothing to delete",
	opAsk:              "{R} answers task {k}",
	opAnswer:           "{R} answers that it has no reference, and has yet to write the fence",
	opFence:            "{R} writes the fence",
	opRefused:          "{R} answers task {k} that a reference blocks",
	opChanged:          "task {k} finds that what it read has changed",
	opAccept:           "task {k} accepts the deletion",
	opPrune:            "the expired blockades of {R} are dropped, and its source if nothing refers",
	opCrashTask:        "task {k} crashes",
	opHear:             "{R} hears of the deletion",
	opHandle:           "{R} clears or deletes {R}{f}, which refers to what it heard is being deleted",
	opFinisher:         "a handler begins to finish the deletion",
	opCheckSubscriber:  "{R} answers that no reference is left",
	opFinisherReads:    "the handler reads who is suspect",
	opFinish:           "the deletion is finished",
	opRecreate:         "the name is created again",
	opJoin:             "{R} joins",
	opOwnerStandby:     "the owner's standby is up to date, and falls behind from here",
	opOwnerFails:       "the owner fails over to its standby",
	opHomeStandby:      "the standby of {R} is up to date, and falls behind from here",
	opHomeFails:        "{R} fails over to its standby",
	opSweep:            "{R} sees that the owner's epoch has risen, and begins a sweep",
	opSweepPage:        "{R} reads its references for the sweep",
	opSwept:            "the owner takes the sweep of {R} as complete",
	opPurge:            "{R} purges its fences",
}

// String tells the step in words.
func (s Step) String() string {
	text, out := texts[s.op], ""
	for j := 0; j < len(text); j++ {
		if text[j] != '{' {
			out += text[j : j+1]
			continue
		}
		switch text[j+1] {
		case 'R':
			out += string(rune('A' + s.r))
		case 'f':
			out += fmt.Sprint(s.i + 1)
		case 'k':
			out += fmt.Sprint(s.k + 1)
		case 't':
			out += fmt.Sprint(s.tx)
		case 'a':
			out += fmt.Sprint(s.attempt)
		}
		j += 2
	}
	return out
}
