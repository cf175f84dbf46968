//go:build unix && !linux

package redisserver

import "syscall"

// childAttributes makes a child that is out of reach of the terminal's Ctrl-C. Only Linux can also end it when we do.
func childAttributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
