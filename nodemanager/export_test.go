package nodemanager

// AssignOnGrid is Assign with a grid of one's choice.
var AssignOnGrid = assignOnGrid

// Reach makes l ask who is reachable.
func Reach(l *Local, reachable func(member string) bool) { l.reachable = reachable }
