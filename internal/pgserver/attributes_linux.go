package pgserver

import "syscall"

// childAttributes makes a child that runs as the given user (nil: as we do),
// is out of reach of the terminal's Ctrl-C, and is shut down at once if we die.
func childAttributes(as *syscall.Credential) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Credential: as,
		Setpgid:    true,
		Pdeathsig:  syscall.SIGQUIT, // PostgreSQL's "immediate shutdown"
	}
}
