package localpeer

import (
	"fmt"
	"net"
	"os/user"
	"strconv"

	"golang.org/x/sys/unix"
)

// userOf says who opened a connection, for logs.
func userOf(conn *net.UnixConn) string {
	raw, err := conn.SyscallConn()
	if err != nil {
		return "local user"
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err != nil || credErr != nil {
		return "local user"
	}
	name := "?"
	if u, err := user.LookupId(strconv.Itoa(int(cred.Uid))); err == nil {
		name = u.Username
	}
	return fmt.Sprintf("local user %s (uid %d, pid %d)", name, cred.Uid, cred.Pid)
}
