package workloadapi

import (
	"fmt"
	"sync"
	"syscall"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	// What one process may hold open and ask for, so that it cannot starve the others.
	// The rate is above what a well-behaved one can need: it keeps its streams.
	maxConnections = 64
	maxStreams     = 256
	maxRate        = 20_000 // a second: calls cost 1, lasting ones and connections 2

	// What all of them may hold open; the processes of one user, no more than they leave
	// to the others: a user alone gets half, two that both want all a third each.
	maxTotal = 16_384 // connections, and as many streams

	filesPerConnection = 4 // the socket, the pidfd, /proc/PID, and what a look at the process opens

	busyPause = 50 * time.Millisecond // who asks too often is answered so late, and told to wait as long
	fullPause = time.Second

	// Who is refused at connecting may ask why.
	maxRefused  = 64
	refusedTime = time.Second
)

// process tells callers apart. On darwin, where the pid is not known, all of one
// user count as one.
type process struct {
	pid int
	uid uint32
}

type usage struct{ connections, streams int }

func (u usage) plus(o usage) usage {
	return usage{u.connections + o.connections, u.streams + o.streams}
}
func (u usage) minus(o usage) usage {
	return usage{u.connections - o.connections, u.streams - o.streams}
}
func (u usage) within(o usage) bool { return u.connections <= o.connections && u.streams <= o.streams }

// limits count what is open and asked for.
type limits struct {
	rate float64 // maxRate, but in tests
	most usage   // of all

	mu        sync.Mutex
	all       usage
	users     map[uint32]usage
	processes map[process]*account
	swept     time.Time
	refused   int // connections whose callers are being told why
}

// account is one process's.
type account struct {
	usage
	spent float64 // what it asked for lately, less rate for each second
	at    time.Time
	told  time.Time // when the log was
}

func newLimits() *limits {
	most := maxTotal
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil && files.Cur/filesPerConnection < maxTotal {
		most = int(files.Cur / filesPerConnection)
	}
	return &limits{rate: maxRate, most: usage{most, maxTotal}, users: map[uint32]usage{}, processes: map[process]*account{}}
}

// take counts what a process opens, and refuses what is too much: once it holds too much
// with open set, and after busyPause if it asks too often. The log is to be told of a
// refusal when loud is set.
func (l *limits) take(key process, more usage, cost float64) (release func(), loud bool, err error) {
	l.mu.Lock()
	now := time.Now()
	a := l.account(key, now)
	user := l.users[key.uid].plus(more)
	switch {
	case !a.plus(more).within(usage{maxConnections, maxStreams}):
		err = exhausted(fullPause, "process %d has %d connections and %d streams open here; close some", key.pid, a.connections, a.streams)
	case !user.within(l.most.minus(l.all.plus(more))):
		err = exhausted(fullPause, "all processes have %d connections and %d streams open here, those of user %d too many of them; close some", l.all.connections, l.all.streams, key.uid)
	}
	if err != nil {
		loud = a.loud(now)
		l.mu.Unlock()
		return nil, loud, err
	}
	a.spent = max(0, a.spent-l.rate*now.Sub(a.at).Seconds())
	a.at = now
	busy := a.spent+cost > l.rate
	if busy {
		loud = a.loud(now)
	} else {
		a.spent += cost
	}
	a.usage, l.users[key.uid], l.all = a.plus(more), user, l.all.plus(more)
	l.mu.Unlock()

	release = func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		a.usage, l.all = a.minus(more), l.all.minus(more)
		if user := l.users[key.uid].minus(more); user == (usage{}) {
			delete(l.users, key.uid)
		} else {
			l.users[key.uid] = user
		}
	}
	if !busy {
		return release, false, nil
	}
	time.Sleep(busyPause) // counted: it cannot have many answered at a time
	release()
	return nil, loud, exhausted(busyPause, "process %d asks for more than %.0f calls in a second; keep streams and connections open", key.pid, l.rate)
}

// account finds that of a process. One that holds nothing is kept until it has nothing
// spent either, or connecting anew would pay its debts.
func (l *limits) account(key process, now time.Time) *account {
	if now.Sub(l.swept) > 2*time.Second || now.Before(l.swept) {
		for key, a := range l.processes {
			if a.usage == (usage{}) && (now.Sub(a.at) > time.Second || now.Before(a.at)) {
				delete(l.processes, key)
			}
		}
		l.swept = now
	}
	a := l.processes[key]
	if a == nil {
		a = &account{at: now}
		l.processes[key] = a
	}
	return a
}

// loud says whether the log is to be told: it is once in a while.
func (a *account) loud(now time.Time) bool {
	if now.Sub(a.told) < time.Minute {
		return false
	}
	a.told = now
	return true
}

// tell makes room for one who is refused at connecting, if there is some.
func (l *limits) tell() (release func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refused == maxRefused {
		return nil, false
	}
	l.refused++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.refused--
	}, true
}

// exhausted tells a caller what it has too much of, and when to come back.
func exhausted(wait time.Duration, format string, args ...any) error {
	st := status.New(codes.ResourceExhausted, fmt.Sprintf(format, args...))
	if with, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(wait)}); err == nil {
		st = with
	}
	return st.Err()
}
