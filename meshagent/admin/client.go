package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Client speaks to an agent's admin socket.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the socket at path. Nothing is dialled yet.
func NewClient(path string) *Client {
	return &Client{path, &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
		IdleConnTimeout: time.Minute,
	}}}
}

// UnreachableError: no agent answers.
type UnreachableError struct{ Err error }

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("no agent answers: %v; is it running on this host, is --socket right, and are you its user or root?", e.Err)
}

func (e *UnreachableError) Unwrap() error { return e.Err }

// RefusedError: the agent has answered no.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return e.Reason }

func (c *Client) call(ctx context.Context, method, path string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, nil)
	if err != nil {
		return nil, err
	}
	answer, err := c.http.Do(request)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &UnreachableError{err}
	}
	if answer.StatusCode == http.StatusOK {
		return answer, nil
	}
	defer answer.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(answer.Body, maxBody))
	return nil, &RefusedError{strings.TrimSpace(string(text))}
}

func get[T any](ctx context.Context, c *Client, path string) (*T, error) {
	answer, err := c.call(ctx, http.MethodGet, path)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	value := new(T)
	if err := json.NewDecoder(io.LimitReader(answer.Body, 64<<20)).Decode(value); err != nil {
		return nil, fmt.Errorf("the agent's answer cannot be read: %w", err)
	}
	return value, nil
}

// Status asks how the agent is.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	return get[Status](ctx, c, "/v1/status")
}

// Explain asks what the agent sees of a process.
func (c *Client) Explain(ctx context.Context, pid int) (*Explanation, error) {
	return get[Explanation](ctx, c, "/v1/pid/"+strconv.Itoa(pid))
}

// Register makes this process, and all that it starts, satisfy run:id:ID. The
// registration lasts until release is called; gone is closed when it was lost, as
// when the agent was restarted.
func (c *Client) Register(ctx context.Context, id string) (gone <-chan struct{}, release func(), err error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	answer, err := c.call(ctx, http.MethodPost, "/v1/runs/"+id)
	if err != nil {
		cancel()
		return nil, nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer answer.Body.Close()
		io.Copy(io.Discard, answer.Body)
	}()
	return ended, func() { cancel(); <-ended }, nil
}
