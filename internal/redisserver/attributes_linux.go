package redisserver

import "syscall"

// childAttributes makes a child that is out of reach of the terminal's Ctrl-C, and ends when we do.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
