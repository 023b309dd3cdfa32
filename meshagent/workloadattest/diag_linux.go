package workloadattest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// The messages of sock_diag(7) for one TCP socket. Numbers are in the host's
// byte order, ports and addresses in the network's.
//
//	struct nlmsghdr         { u32 len; u16 type, flags; u32 seq, pid }
//	struct inet_diag_sockid { be16 sport, dport; be32 src[4], dst[4]; u32 if, cookie[2] }
//	struct inet_diag_req_v2 { u8 family, protocol, ext, pad; u32 states; sockid }
//	struct inet_diag_msg    { u8 family, state, timer, retrans; sockid; u32 expires, rqueue, wqueue, uid, inode }
const (
	sockDiagByFamily = 20
	headerSize       = 16
	sockIDSize       = 48
	requestSize      = headerSize + 8 + sockIDSize
	answerSize       = 4 + sockIDSize + 20

	// States of <net/tcp_states.h>.
	tcpEstablished    = 1
	tcpSynReceived    = 3
	tcpListen         = 10
	tcpNewSynReceived = 12
)

// socket is what the kernel says of one TCP socket.
type socket struct {
	state    uint8
	src, dst netip.AddrPort
	uid      uint32
	inode    uint32 // 0: no process has it open
}

var errNoSocket = errors.New("there is no such socket")

// diagnose asks for the socket with this source and destination; with a zero dst,
// for the one that listens at src.
func diagnose(src, dst netip.AddrPort) (socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return socket{}, fmt.Errorf("cannot open a sock_diag socket: %w", err)
	}
	defer unix.Close(fd)
	timeout := unix.NsecToTimeval(int64(time.Second)) // the kernel answers at once or not at all
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return socket{}, err
	}
	if err := unix.Sendto(fd, diagRequest(src, dst), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return socket{}, fmt.Errorf("cannot ask sock_diag: %w", err)
	}
	buffer := make([]byte, 4096)
	for {
		n, from, err := unix.Recvfrom(fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return socket{}, fmt.Errorf("sock_diag did not answer: %w", err)
		}
		if kernel, ok := from.(*unix.SockaddrNetlink); !ok || kernel.Pid != 0 {
			continue // anybody may send to a netlink socket; only the kernel counts
		}
		s, err := parseDiag(buffer[:n])
		if err != nil {
			return socket{}, err
		}
		return s, s.is(src, dst)
	}
}

// is checks that the kernel answered the question. Asked for a connection that is
// gone it may answer with a listener; a listener may be bound to any address.
func (s socket) is(src, dst netip.AddrPort) error {
	sameSource := s.src == src || s.state == tcpListen && s.src.Addr().IsUnspecified() && s.src.Port() == src.Port()
	if !sameSource || s.state != tcpListen && s.dst != dst {
		return errNoSocket
	}
	return nil
}

func diagRequest(src, dst netip.AddrPort) []byte {
	order := binary.NativeEndian
	b := make([]byte, requestSize)
	order.PutUint32(b[0:], requestSize)
	order.PutUint16(b[4:], sockDiagByFamily)
	order.PutUint16(b[6:], unix.NLM_F_REQUEST)
	request := b[headerSize:]
	request[0] = unix.AF_INET6
	if src.Addr().Is4() {
		request[0] = unix.AF_INET
	}
	request[1] = unix.IPPROTO_TCP
	order.PutUint32(request[4:], 1<<32-1) // every state
	id := request[8:]
	binary.BigEndian.PutUint16(id[0:], src.Port())
	binary.BigEndian.PutUint16(id[2:], dst.Port())
	copy(id[4:20], src.Addr().AsSlice())
	copy(id[20:36], dst.Addr().AsSlice())
	order.PutUint64(id[40:], 1<<64-1) // INET_DIAG_NOCOOKIE
	return b
}

// parseDiag reads the one message of an answer.
func parseDiag(b []byte) (socket, error) {
	order := binary.NativeEndian
	if len(b) < headerSize {
		return socket{}, fmt.Errorf("sock_diag: an answer of %d bytes", len(b))
	}
	length := order.Uint32(b)
	if length < headerSize || uint64(length) > uint64(len(b)) {
		return socket{}, fmt.Errorf("sock_diag: a message of %d bytes in %d", length, len(b))
	}
	body := b[headerSize:length]
	switch kind := order.Uint16(b[4:]); kind {
	case sockDiagByFamily:
	case unix.NLMSG_ERROR:
		if len(body) < 4 {
			return socket{}, errors.New("sock_diag: an error without a number")
		}
		errno := unix.Errno(-int32(order.Uint32(body)))
		if errno == unix.ENOENT {
			return socket{}, errNoSocket
		}
		return socket{}, fmt.Errorf("sock_diag: %w", errno)
	default:
		return socket{}, fmt.Errorf("sock_diag: a message of unknown type %d", kind)
	}
	if len(body) < answerSize {
		return socket{}, fmt.Errorf("sock_diag: an answer of %d bytes", len(body))
	}
	id := body[4:]
	address := func(port, ip []byte) netip.AddrPort {
		a := netip.AddrFrom16([16]byte(ip)).Unmap()
		if body[0] == unix.AF_INET {
			a = netip.AddrFrom4([4]byte(ip))
		}
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
	}
	if body[0] != unix.AF_INET && body[0] != unix.AF_INET6 {
		return socket{}, fmt.Errorf("sock_diag: a socket of unknown family %d", body[0])
	}
	rest := body[4+sockIDSize:]
	return socket{
		state: body[1],
		src:   address(id[0:2], id[4:20]),
		dst:   address(id[2:4], id[20:36]),
		uid:   order.Uint32(rest[12:]),
		inode: order.Uint32(rest[16:]),
	}, nil
}
