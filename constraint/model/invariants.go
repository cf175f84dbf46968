package model

// wrong returns what is wrong with a state, or "".
func (w *World) wrong(s *state) string {
	for r := range w.Regions {
		reg := &s.regions[r]
		for i, kind := range w.Regions[r].Referrers {
			uuid := reg.home.refs[i].uuid
			switch {
			case uuid == 0:
			case uuid != s.target.uuid || s.target.state == gone:
				return "a committed reference points to a target that is gone (P7)"
			case kind == blocking && s.target.state == deleting:
				return "a target is being deleted although a committed reference blocks it (I1)"
			case reg.listed.source&kind == 0 && !s.suspect(r):
				return "the Deployment of a committed reference is not among the target's sources (I4, I5)"
			}
		}
	}
	return ""
}

// wrongStep returns what is wrong with a step, or "".
func (w *World) wrongStep(from *state, step Step, to *state) string {
	switch step.op {
	case opAccept:
		if from.tentative() {
			return "a deletion is accepted although an unexpired blockade stands (I3)"
		}
	case opHandle:
		if uuid := from.regions[step.r].home.refs[step.i].uuid; from.accepted&bit(int(uuid-1)) == 0 {
			return "a referrer is cleared or deleted although its target is not being deleted"
		}
	case opEstablish, opEstablishUnheard, opConfirm, opConfirmUnheard:
		for i, was := range from.regions[step.r].listed.blockades {
			for tx, b := range was {
				now := to.regions[step.r].listed.blockades[i][tx]
				own := i == step.i && tx == int(step.tx-1)
				switch {
				case b == 0 || b >= expired:
				case now&^expired < b && !(own && now == 0):
					return "an unexpired blockade is taken away by a message about another attempt or transaction (X5, X41)"
				}
			}
		}
	}
	return ""
}

// canSave reports whether a referrer may begin a transaction, and nothing stands in its way but the protocol.
func (w *World) canSave(s *state) bool {
	if s.target.state != live {
		return false
	}
	for r := range w.Regions {
		for i := range w.Regions[r].Referrers {
			if sv := s.regions[r].saves[i]; sv.phase == idle && int(sv.tx) < w.Regions[r].Saves && s.regions[r].home.refs[i].uuid == 0 {
				return true
			}
		}
	}
	return false
}

// canDelete reports whether a deletion may begin, and no committed reference blocks it.
func (w *World) canDelete(s *state) bool {
	if s.target.state != live || s.deletions == 0 {
		return false
	}
	for r := range w.Regions {
		for i, kind := range w.Regions[r].Referrers {
			if kind == blocking && s.regions[r].home.refs[i].uuid != 0 {
				return false
			}
		}
	}
	return true
}
