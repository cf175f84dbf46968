package model

import "slices"

// steps is the protocol: what can happen next in a state. Each method is one step that is atomic in the real system, because it is one transaction of one
// database, or touches only the memory of one process.
type steps struct {
	*World
	bug  Bug
	from *state
	emit func(Step, state)
}

// all emits every possible next state.
func (p steps) all() {
	s := p.from
	for r := range p.Regions {
		if s.regions[r].joined == 0 {
			p.join(r)
			continue
		}
		for i := range p.Regions[r].Referrers {
			p.begin(r, i)
			p.establish(r, i)
			p.receive(r, i)
			p.commit(r, i)
			p.crashSave(r, i)
			p.expire(r, i)
			p.confirm(r, i)
			p.remove(r, i)
			p.handle(r, i)
		}
		p.hear(r)
		p.sweep(r)
		p.purge(r)
		p.failHome(r)
	}
	for k := range s.tasks {
		p.plan(k)
		p.mark(k)
		p.ask(k)
		p.accept(k)
		p.prune(k)
		p.crashTask(k)
	}
	p.finish()
	p.recreate()
	p.failOwner()
}

// --- A referrer is saved: constraint/save.go.

// begin starts a transaction with a new reference: it notes where its own database stands, and sends the request.
func (p steps) begin(r, i int) {
	reg := &p.from.regions[r]
	if sv := reg.saves[i]; sv.phase != idle || int(sv.tx) == p.Regions[r].Saves || reg.home.refs[i].uuid != 0 || p.from.target.state == gone {
		return
	}
	n := *p.from
	p.request(&n.regions[r], i, n.regions[r].saves[i].tx+1, 1)
	p.emit(Step{op: opBegin, r: r, i: i}, n)
}

func (p steps) request(reg *region, i int, tx, attempt uint8) {
	reg.saves[i] = save{phase: asking, tx: tx, attempt: attempt, homeEpoch: reg.homeEpoch, horizon: reg.horizon}
	if p.Late {
		reg.sent |= sentBit(i, tx, attempt)
	}
}

func sentBit(i int, tx, attempt uint8) uint8 {
	return bit(i*maxSaves*maxTries + int(tx-1)*maxTries + int(attempt-1))
}

// end forgets a transaction. Its number stays used.
func (reg *region) end(i int) { reg.saves[i] = save{tx: reg.saves[i].tx} }

// establish delivers a request for a reference to the owner: the function of that name.
func (p steps) establish(r, i int) {
	reg := &p.from.regions[r]
	if !p.Late { // an answer that nobody waits for changes nothing that a stalled transaction would not
		if sv := reg.saves[i]; sv.phase == asking {
			p.establishOne(r, i, sv.tx, sv.attempt)
		}
		return
	}
	for tx := uint8(1); tx <= maxSaves; tx++ {
		for attempt := uint8(1); attempt <= maxTries; attempt++ {
			if reg.sent&sentBit(i, tx, attempt) != 0 {
				p.establishOne(r, i, tx, attempt)
			}
		}
	}
}

func (p steps) establishOne(r, i int, tx, attempt uint8) {
	n := *p.from
	reg, t := &n.regions[r], &n.target
	sv := &reg.saves[i]
	awaited := sv.phase == asking && sv.tx == tx && sv.attempt == attempt
	blockade := &reg.listed.blockades[i][tx-1]
	step := Step{op: opEstablish, r: r, i: i, tx: tx, attempt: attempt}

	switch {
	case t.state == gone || t.state == deleting && !p.bug.has(EstablishWhileDeleting):
		if awaited {
			reg.end(i)
			step.op = opRefuse
			p.emit(step, n)
		}
		return
	case *blockade&^expired > attempt && !p.bug.has(LowerAttemptReplaces): // stale: nobody waits for this grant
	default:
		*blockade = attempt
		if !p.bug.has(EstablishWithoutSource) {
			reg.listed.source |= p.Regions[r].kind(i)
		}
	}
	if t.version%2 == 1 && !p.bug.has(GrantKeepsOddVersion) {
		t.version++ // whoever is deleting the target must notice, and the grant must be newer than the fences that are being written
	}
	if p.Late && n != *p.from {
		lost := step
		lost.op = opEstablishUnheard
		p.emit(lost, n)
	}
	if awaited {
		sv.phase, sv.uuid, sv.at = replied, t.uuid, fence{n.epoch, t.version}
		p.emit(step, n)
	}
}

// receive delivers the grant.
func (p steps) receive(r, i int) {
	if p.from.regions[r].saves[i].phase != replied {
		return
	}
	n := *p.from
	reg := &n.regions[r]
	sv := &reg.saves[i]
	sv.phase = granted
	if p.bug.has(MarkAfterGrant) {
		sv.homeEpoch, sv.horizon = reg.homeEpoch, reg.horizon
	}
	p.emit(Step{op: opReceive, r: r, i: i}, n)
}

// commit is the last transaction of a save. Under the shared lock of its targets' fences it checks that the grants hold, and writes.
func (p steps) commit(r, i int) {
	n := *p.from
	reg := &n.regions[r]
	sv := &reg.saves[i]
	step := Step{op: opCommit, r: r, i: i, tx: sv.tx}
	switch {
	case sv.phase == checked:
	case sv.phase != granted:
		return
	case p.void(reg, sv):
		step.op = opVoid
		if int(sv.attempt) < p.Regions[r].Tries {
			p.request(reg, i, sv.tx, sv.attempt+1)
		} else {
			reg.end(i)
		}
		p.emit(step, n)
		return
	case p.bug.has(SaveChecksEarly):
		sv.phase, step.op = checked, opCheck
		p.emit(step, n)
		return
	}
	reg.home.refs[i] = ref{uuid: sv.uuid, tx: sv.tx}
	if p.Late {
		reg.confirms |= bit(i*maxSaves + int(sv.tx-1))
	}
	reg.end(i)
	p.emit(step, n)
}

// void reports whether the grant of a save no longer counts.
func (p steps) void(reg *region, sv *save) bool {
	if sv.homeEpoch != reg.homeEpoch && !p.bug.has(GrantSurvivesFailover) {
		return true // our database may have lost the fence
	}
	if sv.horizon != reg.horizon && !p.bug.has(GrantSurvivesPurge) {
		return true // the fence may have been purged
	}
	if sv.at.epoch < reg.home.peer && !p.bug.has(SweepVoidsNothing) {
		return true // the owner may have lost that we refer to it, and has been told in a sweep what we refer to
	}
	for u, f := range reg.home.fences {
		if f == (fence{}) || p.bug.has(SaveIgnoresFences) || u != int(sv.uuid-1) && !p.bug.has(FenceOfOtherUUID) {
			continue
		}
		at := sv.at
		if p.bug.has(FenceIgnoresEpoch) {
			f.epoch, at.epoch = 0, 0
		}
		if at.less(f) || p.bug.has(FenceTooWide) && at.epoch == f.epoch && at.version <= f.version+1 {
			return true
		}
	}
	return false
}

// crashSave ends a transaction without a commit. One that never goes on again shows the same to everybody else, so it only matters if another follows.
func (p steps) crashSave(r, i int) {
	if sv := p.from.regions[r].saves[i]; sv.phase == idle || int(sv.tx) == p.Regions[r].Saves {
		return
	}
	n := *p.from
	n.regions[r].end(i)
	p.emit(Step{op: opCrashSave, r: r, i: i}, n)
}

// expire may happen at any moment after the grant: nothing rests on a clock.
func (p steps) expire(r, i int) {
	for tx, b := range p.from.regions[r].listed.blockades[i] {
		if b == 0 || b >= expired {
			continue
		}
		n := *p.from
		n.regions[r].listed.blockades[i][tx] |= expired
		p.emit(Step{op: opExpire, r: r, i: i, tx: uint8(tx + 1)}, n)
	}
}

// confirm delivers the confirmation of a committed transaction: the owned-pending handler, and function confirm_references.
func (p steps) confirm(r, i int) {
	reg := &p.from.regions[r]
	for tx := uint8(1); tx <= maxSaves; tx++ {
		pending := reg.home.refs[i].tx == tx
		if !pending && reg.confirms&bit(i*maxSaves+int(tx-1)) == 0 {
			continue
		}
		n := *p.from
		reg := &n.regions[r]
		if n.target.state != gone {
			reg.listed.source |= p.Regions[r].kind(i)
			reg.listed.blockades[i][tx-1] = 0
			if p.bug.has(ConfirmDropsAll) {
				reg.listed.blockades[i] = [maxSaves]uint8{}
			}
		}
		if p.Late && n != *p.from {
			p.emit(Step{op: opConfirmUnheard, r: r, i: i, tx: tx}, n)
		}
		if pending {
			reg.home.refs[i].tx = 0
			p.emit(Step{op: opConfirm, r: r, i: i, tx: tx}, n)
		}
	}
}

// remove is a user who drops a reference. Nobody is told.
func (p steps) remove(r, i int) {
	if !p.Regions[r].Removes || p.from.regions[r].home.refs[i].uuid == 0 {
		return
	}
	n := *p.from
	n.regions[r].home.refs[i] = ref{}
	p.emit(Step{op: opRemove, r: r, i: i}, n)
}

// --- A target is deleted, or a source pruned: constraint/delete.go, constraint/pending.go.

// plan reads the epoch, and then who has to be asked: blocking sources, and suspects. An unexpired blockade refuses at once.
func (p steps) plan(k int) {
	s := p.from
	if s.target.state != live || s.tasks[k].phase != idle {
		return
	}
	if s.deletions > 0 && !s.tentative() && !(p.bug.has(ExpiredBlocks) && slices.ContainsFunc(s.regions[:], func(r region) bool { return r.listed.hasExpired() })) {
		n := *s
		n.deletions--
		n.tasks[k] = task{phase: planned, uuid: n.target.uuid, epoch: n.epoch}
		if p.bug.has(QuestionBeforeBegin) {
			n.tasks[k] = task{phase: begun, uuid: n.target.uuid, epoch: n.epoch, version: n.target.version}
		}
		for r := range p.Regions {
			if n.mustAsk(r) && !p.bug.has(SourcesNotAsked) {
				n.regions[r].planned[k] = 1
			}
		}
		p.emit(Step{op: opPlan, k: k}, n)
	}
	for r := range p.Regions {
		if s.prunes == 0 || !s.regions[r].listed.hasExpired() {
			continue
		}
		n := *s
		n.prunes--
		if p.bug.has(ExpiryDropsSource) {
			n.regions[r].listed.dropExpired()
			n.regions[r].listed.source = 0
			p.emit(Step{op: opPrune, r: r}, n)
			continue
		}
		n.tasks[k] = task{phase: planned, uuid: n.target.uuid, epoch: n.epoch, prune: uint8(r + 1)}
		n.regions[r].planned[k] = 1
		p.emit(Step{op: opPlanPrune, k: k, r: r}, n)
	}
}

// mustAsk reports whether a deletion needs the answer of region r.
func (s *state) mustAsk(r int) bool { return s.regions[r].listed.source&blocking != 0 || s.suspect(r) }

func (l *listed) hasExpired() bool {
	for _, txs := range l.blockades {
		for _, b := range txs {
			if b >= expired {
				return true
			}
		}
	}
	return false
}

func (l *listed) dropExpired() {
	for i, txs := range l.blockades {
		for tx, b := range txs {
			if b >= expired {
				l.blockades[i][tx] = 0
			}
		}
	}
}

// mark makes the row version odd: BeginAttempt. Questions carry what it returns. A deletion that has nobody to ask goes without.
func (p steps) mark(k int) {
	if t := p.from.tasks[k]; t.phase != planned && t.phase != begins || !p.from.asks(k) {
		return
	}
	n := *p.from
	t := &n.tasks[k]
	step := Step{op: opMark, k: k}
	if n.target.state != live && (t.prune == 0 || n.target.state == gone) || n.target.uuid != t.uuid ||
		n.epoch != t.epoch && t.prune == 0 && !p.bug.has(EpochAfterPlan) && !p.bug.has(AcceptIgnoresEpoch) {
		step.op = opGiveUp
		n.endTask(k)
		p.emit(step, n)
		return
	}
	n.target.version |= 1
	t.phase, t.epoch, t.version = begun, n.epoch, n.target.version
	p.emit(step, n)
}

func (s *state) asks(k int) bool {
	for r := range s.regions {
		if s.regions[r].planned[k] != 0 {
			return true
		}
	}
	return false
}

func (s *state) endTask(k int) {
	s.tasks[k] = task{}
	for r := range s.regions {
		s.regions[r].planned[k], s.regions[r].answered[k] = 0, 0
	}
}

// ask puts the question of a task to a region: function check_references. A negative answer leaves a fence in the same transaction.
func (p steps) ask(k int) {
	t := p.from.tasks[k]
	if t.phase != begun {
		return
	}
	for r := range p.Regions {
		reg := &p.from.regions[r]
		if reg.planned[k] == 0 || reg.answered[k] > unfenced {
			continue
		}
		n := *p.from
		step := Step{op: opAsk, k: k, r: r}
		answer := p.blocked(reg, r)
		switch {
		case reg.answered[k] == unfenced:
			answer, step.op = nothing, opFence
		case answer == blocked && t.prune == 0:
			step.op = opRefused
			n.endTask(k)
			p.emit(step, n)
			continue
		case answer == nonBlocker && t.prune == 0:
			answer = nothing // to a deletion
		}
		if p.bug.has(LateFence) && step.op == opAsk && answer == nothing {
			n.regions[r].answered[k], step.op = unfenced, opAnswer
			p.emit(step, n)
			continue
		}
		if answer != blocked {
			p.fence(&n.regions[r], t.uuid, fence{t.epoch, t.version})
		}
		n.regions[r].answered[k] = answer
		if p.bug.has(QuestionBeforeBegin) && t.prune == 0 && n.allAnswered(k) {
			n.tasks[k].phase = begins
		}
		p.emit(step, n)
	}
}

// blocked looks for references by name, as the table is.
func (p steps) blocked(reg *region, r int) uint8 {
	answer := uint8(nothing)
	for i := range p.Regions[r].Referrers {
		if reg.home.refs[i].uuid != 0 {
			if p.Regions[r].kind(i) == blocking {
				return blocked
			}
			answer = nonBlocker
		}
	}
	return answer
}

// fence voids all grants for the incarnation from before f. An answer is sent only once it would survive a failover of its database.
func (p steps) fence(reg *region, uuid uint8, f fence) {
	if old := &reg.home.fences[uuid-1]; !p.bug.has(NoFence) && old.less(f) {
		*old = f
		if p.bug.has(FenceReplaced) {
			reg.home.fences = [maxUUIDs]fence{}
			*old = f
		}
	}
	p.answered(reg)
}

func (p steps) answered(reg *region) {
	if p.Durable && reg.hasStandby != 0 && !p.bug.has(AnswersNotDurable) {
		reg.homeStandby = reg.home
	}
}

func (s *state) allAnswered(k int) bool {
	for r := range s.regions {
		if s.regions[r].planned[k] != 0 && s.regions[r].answered[k] <= unfenced {
			return false
		}
	}
	return true
}

// accept is the last transaction of a deletion: everything that was read is checked again.
func (p steps) accept(k int) {
	t := p.from.tasks[k]
	if t.prune != 0 || t.phase != begun && (t.phase != planned || p.from.asks(k)) || !p.from.allAnswered(k) {
		return
	}
	n := *p.from
	n.endTask(k)
	if !p.acceptable(k) {
		p.emit(Step{op: opChanged, k: k}, n)
		return
	}
	n.accepted |= bit(int(n.target.uuid - 1))
	n.target.state = gone
	for r := range p.Regions {
		if reg := &n.regions[r]; reg.listed.source&subscriber != 0 || n.suspect(r) && !p.bug.has(SuspectsNotTold) {
			n.target.state = deleting
		}
	}
	for r := range n.regions { // they mean nothing from here on
		n.regions[r].listed.blockades = [maxSlots][maxSaves]uint8{}
	}
	if n.target.state == gone {
		n.forget()
	}
	p.emit(Step{op: opAccept, k: k}, n)
}

func (p steps) acceptable(k int) bool {
	s, t := p.from, p.from.tasks[k]
	if s.target.state != live ||
		s.epoch != t.epoch && !p.bug.has(AcceptIgnoresEpoch) ||
		s.tentative() && !p.bug.has(AcceptIgnoresBlockades) {
		return false
	}
	if t.phase == begun && // somebody was asked
		(s.target.uuid != t.uuid && !p.bug.has(AcceptIgnoresUUID) || s.target.version != t.version && !p.bug.has(AcceptIgnoresVersion)) {
		return false
	}
	for r := range p.Regions {
		reg := &s.regions[r]
		if reg.answered[k] == noAnswer && reg.listed.source&blocking != 0 && !p.bug.has(AcceptIgnoresSources) && !p.bug.has(SourcesNotAsked) {
			return false // a suspect that was not asked has none since it ceased to be one
		}
	}
	return true
}

// forget drops what the owner keeps about a target that is gone. Who has confirmed an epoch stays.
func (s *state) forget() {
	for r := range s.regions {
		s.regions[r].listed = listed{confirmed: s.regions[r].listed.confirmed}
	}
}

// prune is the last transaction of the task that asks about an expired blockade: DropBlockades and PruneSource. The source goes only if nothing was
// granted since the question, be the target live or not: what was granted later may be committed while it is being deleted.
func (p steps) prune(k int) {
	t := p.from.tasks[k]
	if t.phase != begun || t.prune == 0 || !p.from.allAnswered(k) {
		return
	}
	n := *p.from
	r := int(t.prune - 1)
	answer := n.regions[r].answered[k]
	n.endTask(k)
	l := &n.regions[r].listed
	if n.target.state != gone {
		l.dropExpired()
	}
	if n.target.uuid == t.uuid &&
		(n.target.state == live && p.bug.has(PruneIgnoresVersion) || n.target.state == deleting && p.bug.has(PruneByOlderAnswer) ||
			n.target.state != gone && n.target.version == t.version) &&
		(n.epoch == t.epoch || p.bug.has(PruneIgnoresEpoch)) && answer == nothing {
		l.source = 0
	}
	p.emit(Step{op: opPrune, k: k, r: r}, n)
}

// crashTask makes room for another attempt; see crashSave.
func (p steps) crashTask(k int) {
	if p.from.tasks[k].phase == idle || p.from.deletions == 0 && p.from.prunes == 0 {
		return
	}
	n := *p.from
	n.endTask(k)
	p.emit(Step{op: opCrashTask, k: k}, n)
}

// --- A deletion is carried out: the subscribed-deleting handler of the referrers, the owned-deleting handler of the owner:
// constraint/subscribed.go, constraint/deleting.go.

// hear tells a subscriber that the target is being deleted: WatchImportedServiceDeletions.
func (p steps) hear(r int) {
	reg, t := &p.from.regions[r], p.from.target
	if t.state != deleting || reg.listed.source&subscriber == 0 || reg.told&bit(int(t.uuid-1)) != 0 {
		return
	}
	n := *p.from
	n.regions[r].told |= bit(int(t.uuid - 1))
	for i := range p.Regions[r].Referrers {
		if p.bug.has(HandlerLooksOnce) && p.Regions[r].kind(i) == subscriber && reg.home.refs[i].uuid == t.uuid {
			n.regions[r].home.refs[i] = ref{}
		}
	}
	p.emit(Step{op: opHear, r: r}, n)
}

// handle clears the field, or deletes the referrer. It goes on as long as there are referrers, however old the news is; that is why a reference knows
// which incarnation it is to.
func (p steps) handle(r, i int) {
	reg := &p.from.regions[r]
	uuid := reg.home.refs[i].uuid
	if uuid == 0 || p.Regions[r].kind(i) != subscriber {
		return
	}
	heard := reg.told&bit(int(uuid-1)) != 0
	if p.bug.has(NewsWithoutUUID) {
		heard = reg.told != 0
	}
	if !heard || p.bug.has(HandlerLooksOnce) {
		return
	}
	n := *p.from
	n.regions[r].home.refs[i] = ref{}
	p.emit(Step{op: opHandle, r: r, i: i}, n)
}

// finish asks everybody who may hold a reference that must be handled, and then removes the target: CheckSubscriber and FinishDeletion. Who only blocks was
// asked before the deletion was accepted. The handler has read its epoch before suspects and sources.
func (p steps) finish() {
	s := p.from
	if s.target.state != deleting {
		return
	}
	f := s.finisher
	if f.uuid != s.target.uuid || f.epoch != s.epoch { // a new handler; until then the old one may go on
		n := *s
		n.finisher = finisher{uuid: s.target.uuid, epoch: s.epoch}
		for r := range n.regions {
			reg := &n.regions[r]
			reg.checked = noAnswer
			if p.bug.has(BlockersCountAsChecked) && reg.listed.source == blocking {
				reg.checked, n.finisher.reads = nonBlocker, 1
			}
		}
		p.emit(Step{op: opFinisher}, n)
	}
	if f.uuid != s.target.uuid {
		return
	}
	if f.reads != 0 {
		n := *s
		n.finisher.reads = 0
		for r := range n.regions {
			if reg := &n.regions[r]; reg.checked == nonBlocker {
				reg.checked = nothing
				if s.suspect(r) {
					reg.checked = noAnswer
				}
			}
		}
		p.emit(Step{op: opFinisherReads}, n)
		return
	}
	ready := f.epoch == s.epoch || p.bug.has(FinishIgnoresEpoch)
	for r := range p.Regions {
		reg := &s.regions[r]
		if reg.listed.source&subscriber != 0 || s.suspect(r) {
			ready = ready && (reg.checked == nothing || p.bug.has(FinishAsksNobody))
			p.check(r, f)
		}
	}
	if ready {
		n := *s
		n.target.state = gone
		n.finisher = finisher{}
		for r := range n.regions {
			n.regions[r].checked = noAnswer
		}
		n.forget()
		p.emit(Step{op: opFinish}, n)
	}
}

// check puts the question of the finisher to a region: function check_references with the behaviors that are handled.
func (p steps) check(r int, f finisher) {
	n := *p.from
	reg := &n.regions[r]
	if reg.checked == nothing {
		return
	}
	step := Step{op: opCheckSubscriber, r: r}
	for i := range p.Regions[r].Referrers {
		if reg.home.refs[i].uuid != 0 && p.Regions[r].kind(i) == subscriber && reg.checked != unfenced {
			return // yes: it will be asked again
		}
	}
	if p.bug.has(LateFence) && reg.checked == noAnswer {
		reg.checked, step.op = unfenced, opAnswer
		p.emit(step, n)
		return
	}
	if p.bug.has(FinishWithoutFence) {
		p.answered(reg)
	} else {
		p.fence(reg, f.uuid, fence{f.epoch, forever})
	}
	reg.checked = nothing
	p.emit(step, n)
}

// recreate makes the name live again as another resource. In the worst case nothing remembers the versions of the first: its tombstone was purged.
func (p steps) recreate() {
	t := p.from.target
	if !p.Recreates || t.uuid == maxUUIDs || t.state != gone && !(t.state == deleting && p.bug.has(ReuseWhileDeleting)) {
		return
	}
	n := *p.from
	n.target = target{uuid: t.uuid + 1}
	p.emit(Step{op: opRecreate}, n)
}

// --- Failures.

// join brings a Deployment into being: it has an empty database.
func (p steps) join(r int) {
	n := *p.from
	n.regions[r].joined = 1
	p.emit(Step{op: opJoin, r: r}, n)
}

// failOwner lets the owner's database fall back to what its standby knew at some moment. Processes keep what they have in memory.
func (p steps) failOwner() {
	s := p.from
	if s.failovers == 0 {
		return
	}
	n := *s
	step := Step{op: opOwnerStandby}
	if s.hasStandby == 0 {
		n.hasStandby, n.standby = 1, n.target
		for r := range n.regions {
			n.regions[r].listedStandby = n.regions[r].listed
		}
	} else {
		step.op = opOwnerFails
		n.hasStandby, n.target, n.standby = 0, n.standby, target{}
		n.epoch++
		n.failovers--
		for r := range n.regions {
			n.regions[r].listed, n.regions[r].listedStandby = n.regions[r].listedStandby, listed{}
		}
		if p.bug.has(NoSuspects) {
			for r := range n.regions {
				n.regions[r].listed.confirmed = n.epoch
			}
		}
	}
	p.emit(step, n)
}

// failHome does the same to a referrer's database.
func (p steps) failHome(r int) {
	reg := &p.from.regions[r]
	if !p.Regions[r].Fails || reg.homeEpoch > 1 {
		return
	}
	n := *p.from
	step := Step{op: opHomeStandby, r: r}
	if reg := &n.regions[r]; reg.hasStandby == 0 {
		reg.hasStandby, reg.homeStandby = 1, reg.home
	} else {
		step.op = opHomeFails
		reg.hasStandby, reg.home, reg.homeStandby = 0, reg.homeStandby, home{}
		reg.homeEpoch++
	}
	p.emit(step, n)
}

// sweep tells the owner, after its epoch rose, about all references: the sweep of the subscribed-deleting handler. It begins with noting the epoch, which
// voids the grants of older ones: what they are for could be committed behind the sweep.
func (p steps) sweep(r int) {
	s, sw := p.from, p.from.regions[r].sweep
	n := *s
	reg := &n.regions[r]
	step := Step{r: r}
	switch {
	case sw.epoch != s.epoch && s.suspect(r): // a new sweep; until then an old one may go on
		again := n
		again.regions[r].home.peer, again.regions[r].sweep = s.epoch, sweep{epoch: s.epoch}
		p.emit(Step{op: opSweep, r: r}, again)
	}
	switch {
	case sw.epoch == 0:
		return
	case sw.read == 0:
		step.op = opSweepPage
		reg.sweep.read = 1
		for i := range p.Regions[r].Referrers {
			if reg.home.refs[i].uuid != 0 {
				reg.sweep.page |= p.Regions[r].kind(i)
			}
		}
		p.answered(reg)
	default:
		step.op = opSwept
		reg.sweep = sweep{}
		if n.target.state != gone && !p.bug.has(SweepBringsNothing) {
			reg.listed.source |= sw.page
		}
		if sw.epoch == s.epoch || p.bug.has(OldSweepCompletes) {
			reg.listed.confirmed = s.epoch
		}
	}
	p.emit(step, n)
}

// purge removes old fences, once.
func (p steps) purge(r int) {
	if !p.Purges || p.from.regions[r].horizon != 0 {
		return
	}
	n := *p.from
	n.regions[r].horizon, n.regions[r].home.fences = 1, [maxUUIDs]fence{}
	p.emit(Step{op: opPurge, r: r}, n)
}
