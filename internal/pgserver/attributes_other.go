//go:build unix && !linux

package pgserver

import "syscall"

// childAttributes makes a child that runs as the given user (nil: as we do)
// and is out of reach of the terminal's Ctrl-C. Only Linux can also end it
// when we die.
func childAttributes(as *syscall.Credential) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: as, Setpgid: true}
}
